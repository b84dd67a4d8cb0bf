"""Every page of the product at the widths of phones, tablets and desks: nothing overflows, breaks in two or is tiny."""

import dataclasses
import itertools
import threading
from pathlib import Path

import pytest
import torch
from playwright.sync_api import expect
from torch import nn

import nin
from nin import checkpoint, data, models, report, server
from nin.narrowing import CurvePoint
from nin.narrowing.report import ControlReport
from nin.profiling.bench.report import html_page
from nin.profiling.bench.runner import Benchmark, EngineResult, Machine
from nin.runtime.timer import Timing
from nin.server import static_export
from nin.speed_search.combinations import Combination
from nin.speed_search.page import render_page
from nin.speed_search.quality import Quality
from nin.speed_search.result import Row, SpeedResult
from nin.speed_search.runners import Setting
from nin.speed_search.timing import Interval
from nin.version import install_command
from support.browser import Visit, needs_chromium, slide
from support.layout import SCHEMES, WIDTHS, axe_faults, layout_faults
from support.serving import Running, make_run, png

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


def write_search(folder):
    """Write the page of a search for the fastest combination, with a loss beyond the chart and long names."""
    rows = tuple(
        Row(
            Combination(form, number, engine),
            {n: Interval(ms * n, ms * n - 0.3, ms * n + 0.4, 9) for n in (1, 32)},
            Quality(162, 0.98, 0.012, 0.86 - lost / 100, lost, 1.2),
            20_500_000,
            412_000_000,
            {n: Setting(2, "channels_last") for n in (1, 32)},
        )
        for form, number, engine, ms, lost in (
            ("original", "float32", "eager", 21.4, 0.0),
            ("original", "bfloat16", "eager", 38.0, 0.1),
            ("original", "float32", "nin", 12.0, 0.0),
            ("original", "int8", "onnxruntime", 5.2, 71.0),
            ("narrowed 0.65", "int8", "openvino", 3.1, 0.62),
            ("narrowed 0.65", "float32", "compile", 3.2, -0.4),
        )
    )
    missing = Row(Combination("original", "int8", "openvino"), reason=f"not installed: {install_command('speed')}")
    machine = {"processor": "A processor", "cores": 2, "kernel": "nin", "versions": {"torch": "2"}, "load": [0.1, 2.5]}
    control = {n: (rows[0].latency[n], rows[0].latency[n]) for n in (1, 32)}
    found = SpeedResult(
        "timm:tf_efficientnet_lite0",
        "photos",
        True,
        1.0,
        (1, 32),
        (*rows, missing),
        rows[4].combination,
        control,
        {**machine, "date": "2026-11-28"},
        ("narrowed 0.5: the budget cannot be reached",),
    )
    path = folder / "fastest.html"
    path.write_text(render_page(found), "utf-8")
    return path


WRITERS = {
    "report": write_run_report,
    "narrowing": write_narrowing_report,
    "speed": write_speed,
    "fastest": write_search,
}


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
            for point in page.locator("svg .point:has(.told)").all()[:6]:  # words that are there while it has the focus
                point.focus()
                expect(point.locator(".told text").first).to_be_visible()
                assert layout_faults(page) == [], (width, scheme, point.get_attribute("aria-label"))
        assert axe_faults(axe, page) == []
    page.close()
    assert wrong == []


def test_the_charts_of_a_search_stand_beside_each_other_and_always_tell_one_sign(browser, tmp_path):
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.goto(write_search(tmp_path).as_uri())
    charts = page.locator("svg:has(.point)")
    boxes = [chart.bounding_box() for chart in charts.all()]
    assert boxes[0]["y"] == boxes[1]["y"]
    assert boxes[1]["x"] + boxes[1]["width"] > 1100
    told = """charts => charts.map(chart => [...chart.querySelectorAll(".told")].filter(
        words => getComputedStyle(words).display !== "none").map(words => words.querySelector("text").textContent))"""
    fastest, eager = ["narrowed 0.65, int8, OpenVINO"], ["original, float32, PyTorch eager"]
    assert charts.evaluate_all(told) == [fastest, fastest]
    points = charts.nth(0).locator(".point")
    points.nth(1).focus()
    assert charts.evaluate_all(told) == [eager, fastest]
    page.keyboard.press("Tab")
    assert charts.evaluate_all(told) == [["original, float32, nin's operator"], fastest]
    points.nth(1).hover(force=True)  # before that which has the focus
    assert charts.evaluate_all(told) == [eager, fastest]
    page.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Serve the lesson with a look inside."""
    run = make_run(tmp_path_factory.mktemp("served") / "run")
    running = Running(server.create_app(run))
    running.run = run
    running.app.state.service.runs[0].samples.thread.join(timeout=60)
    yield running
    running.stop()


@pytest.mark.parametrize("width", WIDTHS)
def test_the_served_page_fits_every_screen(browser, axe, served, width):
    scheme = SCHEMES[WIDTHS.index(width) % 2]
    made = Visit(
        browser, served, viewport={"width": width, "height": 800}, color_scheme=scheme, reduced_motion="reduce"
    )
    page = made.page
    expect(page.locator("#inside [data-paths] h3")).to_have_count(1)
    page.locator("#one-channel").get_by_label("ReLU").uncheck()
    slide(page, "weight", -2.7)  # the widest numbers of step 1
    for r in (20, 64, 128, 200, 256):  # the label of step 5 goes with it
        slide(page, "r:", r)
        assert layout_faults(page) == [], r
    page.emulate_media(color_scheme=SCHEMES[1 - SCHEMES.index(scheme)])
    assert layout_faults(page) == []
    page.goto(served.url + "/api")
    expect(page.get_by_role("heading", name="POST /api/predict")).to_be_visible()
    for scheme in SCHEMES:
        page.emulate_media(color_scheme=scheme)
        assert layout_faults(page) == []
    if width == WIDTHS[0]:
        assert axe_faults(axe, page) == []
    made.close()


def test_a_copy_of_the_page_fits_every_screen(browser, axe, served, tmp_path, monkeypatch):
    monkeypatch.setattr(static_export, "MEASURED_WIDTHS", ())
    monkeypatch.setattr(static_export, "MAX_BYTES", 1)
    index = server.export_page(served.run, tmp_path / "copy")
    page = browser.new_page(reduced_motion="reduce")
    wrong = []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(index.as_uri())
    page.wait_for_selector("html[data-ready]")
    expect(page.locator("#inside [data-paths] h3")).to_have_count(1)
    for width, scheme in itertools.product(WIDTHS, SCHEMES):
        page.emulate_media(color_scheme=scheme)
        page.set_viewport_size({"width": width, "height": 800})
        assert layout_faults(page) == [], (width, scheme)
    assert wrong == []
    for scheme in SCHEMES:  # last: axe asks for the page's style sheets, which its policy refuses on the console
        page.emulate_media(color_scheme=scheme)
        page.set_viewport_size({"width": WIDTHS[0], "height": 800})
        assert axe_faults(axe, page) == [], scheme
    page.close()


def test_the_circle_of_step_6_is_a_circle_on_a_portrait_photo(browser, served):
    made = Visit(browser, served, reduced_motion="reduce")
    step = made.page.locator("#colours")
    photo = {"name": "x.png", "mimeType": "image/png", "buffer": png(size=(30, 90))}
    step.locator("input[type=file]").set_input_files(photo)
    expect(step.locator("canvas").first).to_have_attribute("width", "30")
    step.get_by_role("application").focus()
    made.page.keyboard.press("ArrowDown")
    step.get_by_role("application").click(position={"x": 100, "y": 100})
    circle = step.locator(".marker").bounding_box()
    assert circle["width"] == pytest.approx(circle["height"], abs=1)
    made.close()


def test_a_layer_that_takes_long_shows_no_numbers_of_another(browser, served):
    """The maps and sums of the layer before go at once, and it is said that the next is being computed."""
    made = Visit(browser, served, reduced_motion="reduce")
    inside = made.page.locator("#inside")
    expect(inside.locator("[data-paths] h3")).to_have_count(1)
    release, started = threading.Event(), threading.Event()
    served.app.state.service.batcher.compute(lambda: (started.set(), release.wait(20)))
    started.wait(10)
    inside.get_by_role("button", name="block 1, 3×3").click()
    expect(inside.locator("p[role=status]")).to_have_text("This layer is being computed …")
    assert inside.locator("[data-channel], [data-paths] h3").count() == 0
    inside.get_by_role("button", name="block 1, 1×1 (1)").click()  # another is chosen before it comes
    release.set()
    expect(inside.locator("[data-paths] h3")).to_have_count(1, timeout=20_000)
    expect(inside.locator("h3").filter(has_text="block 1, 1×1 (1)").first).to_be_visible()
    expect(inside.locator("p[role=status]")).to_be_hidden()
    made.close()
