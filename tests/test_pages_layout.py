"""Every page of the product at the widths of phones, tablets and desks: nothing overflows, breaks in two or is tiny."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

import nin
from nin import checkpoint, data, models, report
from nin.narrowing import CurvePoint
from nin.narrowing.report import ControlReport
from nin.profiling.bench.report import html_page
from nin.profiling.bench.runner import Benchmark, EngineResult, Machine
from nin.runtime.timer import Timing
from support.browser import needs_chromium
from support.layout import SCHEMES, WIDTHS, axe_faults, layout_faults

pytestmark = needs_chromium

CLASSES = ("cardboard", "glass", "water bottle of plastic", "Donaudampfschifffahrtsgesellschaft", "a", "trash")


def write_run_report(folder):
    """Write the report of an untrained network with long class and file names."""
    folder.mkdir()
    torch.manual_seed(0)
    model = models.nin_digits(len(CLASSES))
    files = [f"val/{CLASSES[i % 6]}/{CLASSES[i % 6]}_of_a-long.name_{i}.jpg" for i in range(60)]
    pixels = torch.randint(0, 256, (60, 1, 8, 8), dtype=torch.uint8)
    test = data.ImageSet(pixels, torch.arange(60) % 6, files)
    images = data.Data("photos of rubbish", test, test, CLASSES, 1, 8, (0.5,), (0.5,), flip=False, shift=1)
    info = checkpoint.RunInfo(
        model=checkpoint.model_description(model),
        classes=CLASSES,
        preprocessing=checkpoint.Preprocessing(8, 1, (0.5,), (0.5,)),
        recipe={"epochs": 120, "normalisation": "weight_standardisation", "weights": "/home/somebody/runs/" + "x" * 60},
        data={"name": images.name, "train_images": 60, "test_images": 60, "skipped": [[files[0], "damaged"]]},
        result={"test_accuracy": 0.1, "seconds": 7.0},
        environment={"torch": "2", "backends": {"cpu": "reference, wherever it is not faster in PyTorch"}},
    )
    checkpoint.save_model(folder, model, info)
    head = "epoch,train_loss,train_accuracy,test_loss,test_accuracy,seconds"
    lines = [f"{i},{2.0 - i / 9},{i / 9},1.5,{i / 10},{30.0 * i}" for i in range(1, 9)]
    (folder / "metrics.csv").write_text("\n".join([head, *lines]) + "\n")
    return report.write_report(folder, images)


def write_narrowing_report(folder):
    """Write the page of a narrowing with several budgets, a control and points that lie near each other."""
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 16, 3), nn.Flatten())
    result = nin.narrow(model, [torch.randn(8, 3, 12, 12)], macs=0.5)
    times = {1: (Timing(1.0, 0.9, 1.2, 5), Timing(0.8, 0.7, 1.1, 5)), 64: (Timing(9, 8, 30, 5), Timing(8.9, 8, 29, 5))}
    curve = tuple(
        CurvePoint(share, 1_234_567, 5_678, times, {"corrected": 0.9 + share / 500}, 0.02)
        for share in (0.9, 0.8, 0.625, 0.5)
    )
    accuracy = {"original": 0.9017, "raw": 0.8, "corrected": 0.9, "finetuned": 0.9018}
    control = ControlReport(0.71, 9, 1_234_567, 5_678, times, 0.9016)
    made = dataclasses.replace(result.report, latency=times, curve=curve, accuracy=accuracy, control=control)
    path = folder / "narrowing.html"
    path.write_text(report.render_narrowing_report(made, "narrow: narrowed from photos-of-rubbish_at_224"), "utf-8")
    return path


def write_speed(folder):
    """Write the page of a benchmark."""
    machine = Machine(
        "A processor", 2, "nin avx512", {"float32": 511.0}, 43.0, "tuned", {"torch": "2"}, "3.11", "Linux", "2026-11-28"
    )
    results = [
        EngineResult("bottleneck-256-64-4x4-256", "float32", "nin", Timing(5.3, 5.2, 5.9, 9)),
        EngineResult("bottleneck-256-64-4x4-256", "float32", "ONNX Runtime", Timing(17.6, 16.0, 19.9, 9)),
        EngineResult("bottleneck-256-64-4x4-256", "float32", "OpenVINO", None, reason="no bfloat16 on the CPU"),
    ]
    path = folder / "speed.html"
    path.write_text(html_page(Benchmark(machine, results)), "utf-8")
    return path


WRITERS = {"report": write_run_report, "narrowing": write_narrowing_report, "speed": write_speed}


@pytest.fixture(scope="module")
def axe():
    """Load axe-core."""
    playwright = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-core is not here")
    return playwright.Axe()


@pytest.mark.parametrize("name", WRITERS)
def test_a_written_page_fits_every_screen(browser, axe, name, tmp_path):
    path: Path = WRITERS[name](tmp_path / "run" if name == "report" else tmp_path)
    page = browser.new_page(reduced_motion="reduce")
    wrong = []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(path.as_uri())
    for scheme in SCHEMES:
        page.emulate_media(color_scheme=scheme)
        for width in WIDTHS:
            page.set_viewport_size({"width": width, "height": 800})
            assert layout_faults(page) == [], (width, scheme)
        assert axe_faults(axe, page) == []
    page.close()
    assert wrong == []
