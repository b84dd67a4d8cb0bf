"""nin speed: intervals and choices by hand, every engine against the network, and a whole search."""

import dataclasses
import io
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import nin
from nin import checkpoint
from nin.cli import app
from nin.engines.catalog import ENGINES
from nin.errors import UserError
from nin.models.narrowing_plan import LayerPlan, Plan
from nin.narrowing import knapsack, latency
from nin.runtime import timer
from nin.speed_search import processes, quality, session, subject, timing
from nin.speed_search.combinations import REFERENCE, Combination, narrowed_form
from nin.speed_search.forms import NarrowingSettings, narrowed
from nin.speed_search.networks import load_network, save_named, save_run
from nin.speed_search.page import chart, explanation, render_page, time_marks
from nin.speed_search.processes import WorkerError
from nin.speed_search.quantization import QuantizationSpec, quantize_onnx, quantize_openvino
from nin.speed_search.result import Row, SpeedResult, choose, pareto
from nin.speed_search.runners import Setting, WorkerSpec, make_runner
from nin.speed_search.session import SearchSession
from nin.speed_search.settings import SpeedSettings
from nin.speed_search.state import SearchState
from nin.speed_search.timing import Interval, median_interval, time_in_rounds
from nin.speed_search.worker import normalise

MEAN, STD = (0.5, 0.4, 0.6), (0.2, 0.25, 0.3)


def make_network():
    """Return a small classifier; it is the factory that tests name, too."""
    torch.manual_seed(0)
    convs = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 12, 1), nn.ReLU()]
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5))


@pytest.fixture
def module(monkeypatch, tmp_path):
    """Name a module that makes the network, for this process and for those that it starts."""
    source = "import torch\nfrom torch import nn\n\n\ndef make_network():\n"
    body = [
        "torch.manual_seed(0)",
        "convs = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 12, 1), nn.ReLU()]",
        "return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5))",
    ]
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "speed_network.py").write_text(source + "".join(f"    {line}\n" for line in body))
    monkeypatch.syspath_prepend(str(folder))
    return "speed_network:make_network"


def images(count=24, size=16):
    """Return a data set whose five classes are told apart by brightness."""
    labels = torch.arange(count) % 5
    noise = torch.randint(0, 60, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return nin.data.load(((noise + 35 * labels.view(-1, 1, 1, 1).to(torch.uint8), labels), (noise[:10], labels[:10])))


# ---------------------------------------------------------------- intervals


def test_the_interval_of_a_median_holds_it_as_often_as_promised():
    source = random.Random(0)
    for count in (7, 8, 15, 40):
        held = 0
        for _ in range(2000):
            interval = median_interval([source.lognormvariate(0, 1) for _ in range(count)])
            held += interval.low <= 1 <= interval.high
        assert held / 2000 > 0.94, count


def test_intervals_by_hand():
    # of 7 values the smallest and the largest enclose the median in 1 - 2/128 of cases, of 6 in 1 - 2/64
    assert median_interval([7, 6, 5, 4, 3, 2, 1]) == Interval(4, 1, 7, 7)
    # of 9: P(at most 1 below) = 10/512 < 2.5 %
    assert median_interval(range(1, 10)) == Interval(5, 2, 8, 9)
    assert median_interval([3.0]) == Interval(3.0, 3.0, 3.0, 1)
    assert Interval(1, 0.9, 1.1, 9).overlaps(Interval(1.2, 1.1, 1.3, 9))
    assert not Interval(1, 0.9, 1.1, 9).overlaps(Interval(1.3, 1.2, 1.4, 9))


def test_rounds_go_on_in_turn_until_every_median_is_known():
    calls = []
    noise = iter([2.0, 9.0, 4.0, 1.0, 3.0, 7.0, 5.0, *[3.0] * 100])

    def steady():
        calls.append("steady")
        return 1.0

    def noisy():
        calls.append("noisy")
        return next(noise)

    times = time_in_rounds({"steady": steady, "noisy": noisy}, seconds=60)
    assert calls == ["steady", "noisy"] * (len(calls) // 2)
    assert timing.MIN_ROUNDS < len(times["noisy"]) <= timing.MAX_ROUNDS
    assert median_interval(times["noisy"]).is_precise


def test_rounds_end_with_the_time_and_count_those_made_before():
    times = time_in_rounds({"a": iter(range(1, 99)).__next__}, seconds=0, before={"a": [50.0, 51.0]})
    assert times["a"] == [50.0, 51.0, 1, 2, 3, 4, 5]
    numbers = []
    source = random.Random(0)
    time_in_rounds({"a": source.random}, seconds=60, on_round=numbers.append)
    assert numbers == list(range(1, timing.MAX_ROUNDS + 1))


# ---------------------------------------------------------------- answers


def test_quality_by_hand():
    reference = torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0], [2.0, 0.0]])
    scores = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 0.0]])
    labels = torch.tensor([0, 0, 0, 1])  # right of the original: 0 and 2; of the other: 0 and 1
    found = quality.compare(scores, reference, labels)
    assert (found.images, found.agreement, found.accuracy, found.lost) == (4, 0.5, 0.5, 0.0)
    assert found.lost_error == pytest.approx(100 * 1.96 * math.sqrt(2) / 4)
    p, q = torch.softmax(reference.double(), 1), torch.softmax(scores.double(), 1)
    assert found.divergence == pytest.approx((p * (p / q).log()).sum(1).mean().item())
    without = quality.compare(scores, reference, None)
    assert (without.accuracy, without.lost) == (None, 50.0)
    assert quality.compare(reference, reference, None) == quality.Quality(4, 1.0, 0.0, None, 0.0, 0.0)


# ---------------------------------------------------------------- the choice


def row(form="original", number="float32", engine="eager", ms=10.0, spread=0.1, lost=0.0, batch=1):
    return Row(
        Combination(form, number, engine),
        {batch: Interval(ms, ms - spread, ms + spread, 9)},
        quality.Quality(200, 0.99, 0.01, 0.9 - lost / 100, lost, 0.4),
        1_000_000,
        200_000_000,
        {batch: Setting(2, "channels_last")},
    )


def test_the_fastest_is_that_of_the_first_batch_size():
    """The others may be fastest at another one, and are contenders for that."""
    one = dataclasses.replace(
        row(engine="onnxruntime"), latency={1: Interval(0.4, 0.4, 0.4, 9), 64: Interval(30, 30, 30, 9)}
    )
    many = dataclasses.replace(row(engine="nin"), latency={1: Interval(0.9, 0.9, 0.9, 9), 64: Interval(15, 15, 15, 9)})
    assert session.find_fastest([many, one], 1) == one.combination
    assert session.find_fastest([many, one], 64) == many.combination


def result(*rows, lose=1.0, chosen=None, labelled=True, batches=(1,)):
    control = {n: (Interval(10.0, 9.9, 10.1, 9), Interval(10.3, 10.2, 10.5, 7)) for n in batches}
    machine = {
        "processor": "A processor",
        "cores": 2,
        "kernel": "nin avx2",
        "versions": {"torch": "2"},
        "load": [0.1, 2.5],
        "date": "2026-11-28",
    }
    chosen = chosen or choose(rows, lose, batches[0])
    return SpeedResult("net", "photos", labelled, lose, batches, rows, chosen, control, machine)


def test_the_fastest_within_the_limit_is_chosen_and_equal_ones_are_told_by_their_loss():
    rows = (
        row(),
        row(number="int8", engine="onnxruntime", ms=2.0, lost=1.5),
        row(number="int8", engine="openvino", ms=3.0, lost=0.9),
        row("narrowed 0.5", "int8", "openvino", ms=3.1, lost=0.4),
        row("narrowed 0.8", "int8", "openvino", ms=3.5, lost=0.1),
    )
    chosen = choose(rows, 1.0, 1)
    assert chosen == Combination("narrowed 0.5", "int8", "openvino")  # 3.0 and 3.1 ms overlap
    assert choose(rows, 2.0, 1) == rows[1].combination
    assert choose(rows, 0.2, 1) == rows[4].combination
    assert choose(rows[1:2], 1.0, 1) is None
    assert [r.combination for r in result(*rows).equals(1)] == [rows[2].combination]
    assert pareto(rows, 1) == [rows[1], rows[2], rows[3], rows[4], rows[0]]
    assert pareto((*rows, row(engine="nin", ms=4.0, lost=0.5)), 1) == pareto(rows, 1)


def test_the_table_says_what_is_equal_and_how_far_the_machine_drifted():
    rows = (
        row(),
        row(engine="nin", ms=5.0),
        row(engine="openvino", ms=5.1, lost=0.2),
        Row(Combination("original", "int8", "openvino"), reason="no nncf"),
    )
    found = result(*rows)
    cells = {line[2]: line for line in found.table()}
    assert list(cells)[1:] == ["nin's operator ←", "OpenVINO =", "PyTorch eager"]
    assert cells["nin's operator ←"][3:5] == ("5.00 (4.90 to 5.10)", "2.00")
    text = str(found)
    assert "differed by +3.0 %, beyond its interval" in text
    assert "original, int8, OpenVINO: no nncf" in text
    assert SpeedResult.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert "None loses at most 1 point of accuracy." in str(result(row(lost=3.0)))


def test_missing_engines_are_named_with_the_command_that_installs_them(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert ENGINES["openvino"].missing("int8") == (
        "not installed (onnx, onnxscript, onnxruntime, openvino, nncf): pip install 'network-in-network[speed]'"
    )
    assert ENGINES["eager"].missing("float32") == ""


# ---------------------------------------------------------------- engines


def saved_network(folder, module):
    save_named(folder, nin.models.factory.create_external_model(module).model.eval(), module, None)
    return folder


def spec(path, engine, number="float32", **changes):
    values = {"input_shape": (3, 16, 16), "batches": (1, 3), "mean": MEAN, "std": STD, "threads": 1}
    return WorkerSpec(engine, number, str(path), **{**values, **changes})


@pytest.mark.parametrize("number", ["float32", "bfloat16"])
@pytest.mark.parametrize("engine", ["eager", "nin"])
def test_pytorch_engines_give_the_networks_scores(engine, number, module, tmp_path):
    folder = saved_network(tmp_path / "network", module)
    runner = make_runner(spec(folder, engine, number))
    model = make_network().eval()
    for count in (1, 3):
        x = np.random.default_rng(0).standard_normal((count, 3, 16, 16)).astype(np.float32)
        with torch.no_grad():
            expected = model(torch.from_numpy(x))
        for setting in runner.candidates():
            got = runner.bind(x, setting)()
            assert got.dtype == np.float32
            torch.testing.assert_close(
                torch.from_numpy(got), expected, **({} if number == "float32" else {"atol": 0.05, "rtol": 0.05})
            )


def test_int8_of_onnx_runtime_and_openvino_stay_near_the_network(module, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("openvino")
    model = nin.models.factory.create_external_model(module).model.eval()
    nin.export(model, tmp_path / "model.onnx", input_shape=(3, 16, 16))
    pixels = torch.randint(0, 256, (16, 3, 16, 16), dtype=torch.uint8)
    np.save(tmp_path / "pixels.npy", pixels.numpy())
    x = normalise(pixels[:3].numpy(), MEAN, STD)
    assert x == pytest.approx(nin.data.to_float(pixels[:3], MEAN, STD, dtype=torch.float32).numpy(), abs=1e-6)
    with torch.no_grad():
        expected = model(torch.from_numpy(x)).numpy()
    files = {"onnxruntime": "int8.onnx"}
    quantize = {"onnxruntime": quantize_onnx, "openvino": quantize_openvino}
    pairs = [("onnxruntime", "float32", "model.onnx"), ("openvino", "float32", "model.onnx")]
    for engine, name in files.items():
        how = QuantizationSpec(
            engine, str(tmp_path / "model.onnx"), str(tmp_path / name), str(tmp_path / "pixels.npy"), MEAN, STD, True
        )
        quantize[engine](how)
        pairs.append((engine, "int8", name))
    for engine, number, name in pairs:
        runner = make_runner(spec(tmp_path / name, engine, number))
        got = runner.bind(x, runner.candidates()[0])()
        error = np.abs(got - expected).max() / np.abs(expected).max()
        assert error < (1e-4 if number == "float32" else 0.1), (engine, number)
        assert number == "float32" or error > 0  # it is another network


def test_the_weights_of_int8_have_a_scale_for_each_channel(tmp_path):
    """Narrowing's forms, k×k → 1×1 and 1×1 → k×k → 1×1, are quantised as their layers, each weight per channel."""
    onnx = pytest.importorskip("onnx")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 24, 3, padding=1), nn.ReLU())
    forms = LayerPlan("0", "output", None, 10, 3, 24), LayerPlan("2", "tucker", 12, 14, 24, 24)
    narrowed = nin.apply_plan(model, Plan(forms, (), "macs", 0.5)).eval()
    nin.export(narrowed, tmp_path / "model.onnx", input_shape=(3, 12, 12))
    np.save(tmp_path / "pixels.npy", torch.randint(0, 256, (8, 3, 12, 12), dtype=torch.uint8).numpy())
    files = [str(tmp_path / name) for name in ("model.onnx", "int8.onnx", "pixels.npy")]
    quantize_onnx(QuantizationSpec("onnxruntime", *files, (0.5,) * 3, (0.25,) * 3, True))
    graph = onnx.load(files[1]).graph
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    plain = [m for m in narrowed.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == len(plain) == 5
    producers = {node.output[0]: node for node in graph.node}
    for node, layer in zip(convolutions, plain, strict=True):
        values, scales, _ = producers[node.input[1]].input
        assert weights[values].dtype == np.int8
        assert weights[scales].shape == (layer.out_channels,)
        # the largest weight of each channel has the largest of its numbers, whatever the other channels' weights are
        expected = layer.weight.detach().abs().amax((1, 2, 3)).numpy() / 127
        assert weights[scales] == pytest.approx(expected, rel=0.01)


def test_run_folders_and_their_narrowed_forms_are_loaded_as_they_answer(run, tmp_path):
    model, info = checkpoint.load_model(run)
    model.fold()  # as `load_subject` does
    save_run(tmp_path / "same", model, info, None)
    x = torch.rand(2, 1, 8, 8)
    expected = nin.load(run).model(x)
    for plain in (True, False):
        loaded = load_network(tmp_path / "same", plain=plain)
        torch.testing.assert_close(loaded(x), expected)
        assert not plain or not any(isinstance(m, nin.MLPConv) for m in loaded.modules())
    narrowed = nin.narrow(model, [torch.rand(64, 1, 8, 8)], macs=0.6)
    save_run(tmp_path / "narrowed", narrowed.model, info, narrowed.plan)
    torch.testing.assert_close(load_network(tmp_path / "narrowed", plain=True)(x), narrowed.model(x))


# ---------------------------------------------------------------- what it is asked about


def test_a_folder_without_classes_is_two_parts_that_share_no_image(tmp_path, module):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(9):
        Image.new("RGB", (20, 18), (number * 20, 60, 90)).save(folder / f"{number}.png")
    found = subject.load_subject(module, folder, size=16)
    assert not found.labelled
    train, test = set(found.images.train.names), set(found.images.test.names)
    assert not train & test
    assert len(train | test) == 9
    pixels, labels = found.test_pixels(2000)
    assert (pixels.shape, labels) == ((4, 3, 16, 16), None)
    (folder / "@eaDir").mkdir()
    assert subject.is_unlabelled(folder)  # of a network disk, which holds no images
    (folder / "0").mkdir()
    assert not subject.is_unlabelled(folder)


@pytest.mark.parametrize("given", ["photos", "./photos", "nested/../photos", ".", "link"])
def test_a_folder_without_classes_is_read_by_any_of_its_paths(given, tmp_path, module, monkeypatch):
    folder = tmp_path / "photos"
    folder.mkdir()
    (tmp_path / "nested").mkdir()
    (tmp_path / "link").symlink_to(folder)
    for number in range(4):
        Image.new("RGB", (20, 18), (number * 20, 60, 90)).save(folder / f"{number}.png")
    monkeypatch.chdir(folder if given == "." else tmp_path)
    found = subject.load_subject(module, given, size=16)
    monkeypatch.chdir("/")
    assert len(found.test_pixels(2000)[0]) == len(found.calibration_pixels(128, 0)) == 2
    assert found.images.name == "photos"
    assert sorted([*found.images.train.names, *found.images.test.names]) == [f"{number}.png" for number in range(4)]


def test_a_folder_without_any_image_is_refused_with_all_that_is_taken(tmp_path, module):
    (tmp_path / "photos" / "cats").mkdir(parents=True)
    (tmp_path / "photos" / "note.txt").write_text("none")
    with pytest.raises(
        UserError, match=r"DIR/<class>/<image>, .* or a folder of images without classes, got no images"
    ):
        subject.load_subject(module, tmp_path / "photos")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"mean": (0.5,)}, "mean must be 3 numbers, one for each channel, got 1"),
        ({"std": (0.5, 0.5)}, "std must be 3 numbers, one for each channel, got 2"),
        ({"mean": (0.5,) * 3, "std": (0.5, 0.0, 0.5)}, "std must be above 0, got 0.0"),
        ({"mean": (0.5, float("nan"), 0.5)}, "mean must be finite, got 0.5, nan, 0.5"),
        ({"weights": Path("missing.pth")}, "--weights: missing.pth does not exist"),
        ({"size": 0}, "size must be at least 1, got 0"),
    ],
)
def test_wrong_options_of_a_named_network_are_refused_before_it_is_made(options, expected, monkeypatch):
    monkeypatch.setattr(subject, "create_external_model", None)
    monkeypatch.setattr(subject, "load_trained", None)
    with pytest.raises(UserError, match=f"^{re.escape(expected)}$"):
        subject.load_subject("torchvision:resnet18", images(), **options)


def test_the_mean_is_checked_before_images_are_read(tmp_path, module):
    weights = tmp_path / "weights.pth"
    torch.save(nin.models.factory.create_external_model("torchvision:squeezenet1_1").model.state_dict(), weights)
    with pytest.raises(UserError, match="mean must be 3 numbers"):
        subject.load_subject("torchvision:squeezenet1_1", "nowhere", weights=weights, mean=(0.5,))


def test_weights_are_matched_by_order_and_published_preprocessing_is_used(tmp_path):
    pytest.importorskip("timm")
    import timm

    torch.manual_seed(1)
    model = timm.create_model("test_efficientnet", pretrained=False)
    renamed = {f"x{i}.{name.rsplit('.', 1)[1]}": t for i, (name, t) in enumerate(model.state_dict().items())}
    torch.save(renamed, tmp_path / "weights.pth")
    data = images(size=32)
    found = subject.load_subject("timm:test_efficientnet", data, weights=tmp_path / "weights.pth")
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(found.model(x), model.eval()(x))
    assert found.preprocessing.mean == pytest.approx(timm.get_pretrained_cfg("test_efficientnet").mean)
    assert not found.labelled  # 1,000 scores, 5 classes


def test_weights_of_other_classes_make_the_network_for_them(tmp_path):
    """Its folder says so, too: the processes that measure it make the same network."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(2)
    model = timm.create_model("test_efficientnet", pretrained=False, num_classes=5).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    found = subject.load_subject("timm:test_efficientnet", images(size=32), weights=tmp_path / "weights.pth")
    assert found.labelled
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(found.model(x), model(x))
    found.save(tmp_path / "it", found.model)
    torch.testing.assert_close(load_network(tmp_path / "it", plain=True)(x), model(x))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"batches": ()}, "batches must hold at least one"),
        ({"batches": (0,)}, "batch must be at least 1, got 0"),
        ({"budgets": (1.2,)}, "budgets must be a share"),
        ({"engines": ("tensorrt",)}, "engine must be one of eager"),
        ({"lose": -1.0}, "lose must be at least 0 and at most 100 points, got -1"),
        ({"lose": 101}, "lose must be at least 0 and at most 100 points, got 101"),
        ({"threads": 0}, "threads must be at least 1"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_loaded(options, expected):
    with pytest.raises(UserError, match=expected):
        nin.speed("runs/missing", "nowhere", **options)


def test_what_is_not_a_network_or_belongs_to_a_run_is_refused(run, tmp_path):
    with pytest.raises(UserError, match="network must be a run folder, or timm:NAME"):
        nin.speed("resnet", images())
    with pytest.raises(UserError, match="go with the name of a network"):
        nin.speed(run, "digits", size=32)
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        nin.speed(run, "digits", out=tmp_path)


@pytest.mark.parametrize("finetune", [0, 1])
def test_narrowed_forms_are_planned_without_a_clock_and_are_the_same_each_time(finetune, module, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the clock was asked")

    for name in ("_steady_ratio", "_time", "_seconds"):
        monkeypatch.setattr(latency, name, refuse)
    for name in ("time_interleaved", "time_until_steady", "summarize"):
        monkeypatch.setattr(timer, name, refuse)
    found = subject.load_subject(module, images(60))
    settings = NarrowingSettings(images=50, finetune=finetune, seed=0)
    (one, plan), (other, again) = (
        narrowed(found, 0.7, settings, tmp_path / name, lambda: False, lambda *_: None) for name in ("a", "b")
    )
    assert plan == again
    assert plan.pruned or any(layer.form != "keep" for layer in plan.layers)
    for name, values in one.state_dict().items():
        assert torch.equal(values, other.state_dict()[name]), name


def test_forms_narrowed_by_latency_are_timed_in_the_fastest_engine(module, tmp_path, monkeypatch):
    rows = {row(engine=name).combination: row(engine=name) for name in ENGINES}
    engines = {}
    for narrow_by in ("macs", "latency"):
        settings = SpeedSettings(batches=(4, 1), narrow_by=narrow_by)
        rows = {c: dataclasses.replace(r, settings={4: Setting(3), 1: Setting(1)}) for c, r in rows.items()}
        search = SimpleNamespace(settings=settings, rows=rows)
        for combination in rows:
            how = SearchSession._narrowing_settings(search, combination)
            assert (how.narrow_by, how.batch, how.threads) == (narrow_by, 4, None if narrow_by == "macs" else 3)
            engines[narrow_by, combination.engine] = how.engine
    assert {engine for (by, _), engine in engines.items() if by == "macs"} == {"pytorch"}
    by_latency = {name: engine for (by, name), engine in engines.items() if by == "latency"}
    assert by_latency == {**{n: n for n in ENGINES}, "eager": "pytorch", "compile": "pytorch"}
    assert [narrowed_form(0.65, by) for by in ("macs", "latency")] == ["narrowed 0.65", "narrowed 0.65 latency"]
    # the budget and the engine arrive where layers are timed
    seen = set()

    def measure(self, chain):
        seen.add((type(self.engine).__name__, self.batch, torch.get_num_threads()))
        return knapsack.macs(chain)

    def compare(self, new, batch):
        before, after = (float(nin.cost(m, (1, 3, 16, 16)).macs) for m in (self.original, new))
        return timer.Timing(before, before, before, 9), timer.Timing(after, after, after, 9)

    monkeypatch.setattr(latency.LatencyTable, "measure", measure)
    monkeypatch.setattr(latency.ModelTimer, "compare", compare)
    how = NarrowingSettings(images=20, finetune=0, seed=0, narrow_by="latency", engine="nin", batch=4, threads=3)
    found = subject.load_subject(module, images(60))
    model, plan = narrowed(found, 0.7, how, tmp_path, lambda: False, lambda *_: None)
    assert seen == {("NinEngine", 4, 3)}
    assert (plan.budget, plan.share) == ("latency", 0.7)
    assert nin.cost(model, (1, 3, 16, 16)).macs <= 0.72 * nin.cost(make_network(), (1, 3, 16, 16)).macs


def test_an_engine_that_is_asked_for_and_missing_is_refused_at_once(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"^engine onnxruntime is not installed \(onnx, .*\): pip install '.*\[speed\]'$"
    ):
        nin.speed("runs/missing", "nowhere", engines=("eager", "onnxruntime"))
    with pytest.raises(SystemExit):
        app.main(["speed", "timm:resnet18", "--data", "digits", "--engine", "openvino"])
    assert "engine openvino is not installed" in capsys.readouterr().err
    SpeedSettings(engines=tuple(ENGINES))  # where all are, those that are missing are named in the result
    with pytest.raises(UserError, match="narrow_by must be macs or latency, got 'time'"):
        SpeedSettings(narrow_by="time")


# ---------------------------------------------------------------- processes


def test_a_process_that_fails_says_why_in_one_line(tmp_path):
    worker = processes.WorkerProcess(spec(tmp_path / "missing.onnx", "onnxruntime"), tmp_path, "failing")
    with worker, pytest.raises(processes.WorkerError, match=r"missing\.onnx"):
        worker.wait_until_ready()
    assert worker.process.poll() is not None


@pytest.mark.parametrize("wait", ["starting", "importing"])
@pytest.mark.parametrize("module_name", ["nin.speed_search.worker", "nin.speed_search.quantization"])
def test_a_process_ends_with_the_program_that_started_it(wait, module_name, tmp_path):
    """Killed in the same moment, or while the process imports something that takes long."""
    (tmp_path / "begun").mkdir()
    slow = "import os, pathlib, time\npathlib.Path(os.environ['BEGUN'], str(os.getpid())).touch()\ntime.sleep(60)\n"
    for name in ("numpy", "onnx", "onnxruntime"):
        (tmp_path / f"{name}.py").write_text(slow)
    values = ["onnxruntime", "", "", "", [0.5], [0.5], True]
    quantization = dict(zip(("engine", "source", "target", "pixels", "mean", "std", "full_range"), values, strict=True))
    text = spec("", "onnxruntime").to_json() if module_name.endswith("worker") else json.dumps(quantization)
    (tmp_path / "spec.json").write_text(text)
    code = """
import os, subprocess, sys
from nin.speed_search.parent_watch import lifeline
with lifeline() as stdin:
    done = subprocess.Popen([sys.executable, "-m", *sys.argv[1:]], stdin=stdin, start_new_session=True)
    print(done.pid, flush=True)
    done.wait()
"""
    environment = {
        **os.environ,
        "BEGUN": str(tmp_path / "begun"),
        "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]),
    }
    command = [sys.executable, "-c", code, module_name, str(tmp_path / "spec.json")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as program:
        pid = int(program.stdout.readline())
        while wait == "importing" and not (tmp_path / "begun" / str(pid)).exists():
            time.sleep(0.01)
        program.kill()
    end = time.monotonic() + 20
    while time.monotonic() < end and is_running(pid):
        time.sleep(0.02)
    assert not is_running(pid)


def is_running(pid):
    """Return whether there is a process of that number that has not ended (one that nobody waits for stays listed)."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return bool(state.strip()) and not state.startswith("Z")


def test_the_state_of_another_search_or_a_damaged_one_is_refused(tmp_path):
    state = SearchState(tmp_path, "one")
    state.set("times", [1.0, 2.0])
    assert SearchState(tmp_path, "one").get("times") == [1.0, 2.0]
    with pytest.raises(UserError, match="begun with another network"):
        SearchState(tmp_path, "two")
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        SearchState(tmp_path, "one")


def test_a_whole_search_stopped_and_resumed(module, tmp_path, monkeypatch):
    """Two engines: what was measured before Ctrl-C is not measured again, and the winner's example is what it says."""
    pytest.importorskip("onnxruntime")
    from nin.speed_search import session

    monkeypatch.setattr(session, "cpu_has_bf16", lambda: False)
    monkeypatch.setattr(session, "SCREENING_SECONDS", 0.0)
    monkeypatch.setitem(ENGINES, "onnxruntime", dataclasses.replace(ENGINES["onnxruntime"], numbers=("float32",)))
    seen, out = [], tmp_path / "fast"

    def stop_at(word):
        return lambda: any(word in text for text in seen)

    def run(word="never"):
        seen.clear()
        return nin.speed(
            module,
            images(),
            engines=("onnxruntime",),
            budgets=(),
            threads=1,
            size=16,
            out=out,
            stop=stop_at(word),
            on_progress=lambda text, done, total: seen.append(text),
        )

    with pytest.raises(KeyboardInterrupt):
        run("As it is (1 of 2): comparing the answers of original, float32, ONNX Runtime")
    assert (out / "search" / "state.json").is_file()
    monkeypatch.setattr("nin.exporters.export", None)  # it is not exported again
    found = run()
    assert not (out / "search").exists()
    assert [r.combination.engine for r in found.rows] == ["eager", "onnxruntime"]
    assert found.rows[1].quality.agreement == 1.0
    assert found.rows[0].peak_bytes > found.rows[1].peak_bytes > 10_000_000  # PyTorch is larger than its rival
    assert found.chosen is not None
    assert set(found.control) == {1}
    assert (out / "example.py").is_file()
    assert {path.name for path in out.iterdir()} >= {"example.py", "speed.html", "speed.json"}
    assert run() == found  # a finished one is read
    assert seen == []


def test_overwrite_is_named_where_it_helps_and_needs_a_folder(run, tmp_path):
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"is damaged .* or --overwrite"):
        SearchState(tmp_path, "key")
    with pytest.raises(UserError, match="overwrite goes with out"):
        nin.speed(run, "digits", overwrite=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_engine_and_narrowed_forms(module, tmp_path, monkeypatch):
    """Every combination whose packages are installed is timed; the slow ones of the original are not narrowed."""
    from nin.speed_search import session

    monkeypatch.setattr(session, "SCREENING_SECONDS", 0.0)
    monkeypatch.setattr(session, "FINAL_SECONDS", 0.0)
    found = nin.speed(module, images(60), batches=(1, 4), budgets=(0.7,), out=tmp_path / "fast", size=16)
    assert {r.combination.engine for r in found.rows} == set(ENGINES)
    assert any(r.combination.form == "narrowed 0.7" and r.latency for r in found.rows)
    for r in found.rows:
        usable = not ENGINES[r.combination.engine].missing(r.combination.number)
        usable &= r.combination.number != "bfloat16" or session.cpu_has_bf16()
        assert set(r.latency) == ({1, 4} if usable else set()), r
        assert not usable or not r.reason or r.reason.startswith("timed in the first rounds only"), r


# ---------------------------------------------------------------- the page and the command


def test_the_page_escapes_names_and_tells_every_point():
    rows = (row(), row(number="int8", engine="onnxruntime", ms=2.0, lost=80.0), row("narrowed 0.5", ms=4.0, lost=-0.5))
    found = dataclasses.replace(result(*rows), network="<b>net</b>")
    page = render_page(found)
    assert "<b>net" not in page
    assert page.count('tabindex="0"') == 4  # three points, and the table
    for r in rows:
        assert f"{r.combination.form}, {r.combination.number}" in page
    assert "http" not in page.replace("http-equiv", "")
    drawn = chart(found, 1)
    assert "lost +80.00" in drawn
    assert page.index("Key of the charts") < page.index(drawn[:40])
    # the words of the fastest fill the place under the chart; without one, those of a sign all the same
    chosen = re.escape(found.chosen.engine and ENGINES[found.chosen.engine].title)
    assert re.search(rf'class="point \w+ chosen first"[^>]*aria-label="[^"]*{chosen}', drawn)
    without = chart(dataclasses.replace(found, chosen=None), 1)
    assert [len(re.findall(r'class="point \w+( chosen)? first"', text)) for text in (drawn, without)] == [1, 1]
    assert time_marks(0.8, 12) == [1.0, 2.0, 5.0, 10.0]
    assert time_marks(3.1, 3.9) == [3.1, 3.9]


@pytest.mark.parametrize("error", [UserError("it cannot be exported"), WorkerError("it cannot be quantised")])
def test_what_is_said_of_the_network_is_a_reason_of_its_row(error):
    session = session_that_builds(error)
    SearchSession._prepare(session, REFERENCE)
    assert session.rows[REFERENCE].reason == str(error)


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), MemoryError("all of it"), KeyError("a fault")]
)
def test_everything_else_ends_the_search(error):
    with pytest.raises(type(error)):
        SearchSession._prepare(session_that_builds(error), REFERENCE)


def session_that_builds(error):
    def build(combination):
        raise error

    builder, nothing = SimpleNamespace(build=build), lambda *_: ""
    return SimpleNamespace(builder=builder, rows={}, _unsuited=nothing, _step=nothing)


def test_a_chart_that_cuts_large_losses_says_so():
    assert "upper edge" not in explanation(result(row(), row(number="int8", lost=3.9)))
    assert "Signs at the upper edge lost 4 or more" in explanation(result(row(), row(number="int8", lost=20.0)))


def test_the_command_prints_the_table_or_json(monkeypatch, capsys):
    given = {}

    def fake(network, data, **options):
        given.update(options, network=network)
        return result(row(), row(engine="nin", ms=5.0))

    monkeypatch.setattr(nin, "speed", fake, raising=False)
    begun = ["speed", "timm:resnet18", "--data", "digits"]
    app.main([*begun, "--batch", "1", "--batch", "32", "--no-narrow", "--lose", "0.5"])
    assert (given["batches"], given["budgets"], given["lose"]) == ((1, 32), (), 0.5)
    assert given["engines"] == tuple(ENGINES)
    assert "nin's operator" in capsys.readouterr().out
    assert given["narrow_by"] == "macs"
    app.main([*begun, "--json", "--engine", "nin", "--narrow-by", "latency"])
    assert (given["narrow_by"], given["engines"]) == ("latency", ("nin",))
    printed = json.load(io.StringIO(capsys.readouterr().out))
    assert printed["chosen"] == {"form": "original", "number": "float32", "engine": "nin"}
    assert given["budgets"] == (0.8, 0.65, 0.5)
    app.main([*begun, "--engine", "nin,eager", "--engine", "compile", "--batch", "1,32", "--batch", "4"])
    assert (given["engines"], given["batches"]) == (("nin", "eager", "compile"), (1, 32, 4))
    with pytest.raises(SystemExit):
        app.main([*begun, "--batch", "1,many"])
    expected = "batch must be whole numbers with commas between them, such as 1,32, got 'many'"
    assert expected in " ".join(capsys.readouterr().err.split())
    app.main([*begun, "--budgets", "none", "--out", "runs/none", "--overwrite"])
    assert (given["budgets"], given["overwrite"]) == ((), True)


def test_a_terminated_search_cleans_up_and_gives_the_shells_status(monkeypatch):
    cleaned = []

    def terminated(network, data, **options):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        finally:
            cleaned.append(True)

    monkeypatch.setattr(nin, "speed", terminated, raising=False)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        app.main(["speed", "timm:resnet18", "--data", "digits"])
    assert (ended.value.code, cleaned) == (143, [True])
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "Nothing is kept without --out"),
        (
            ["--out", "my fast", "--overwrite"],
            "What was measured is kept. Go on with: nin speed timm:resnet18 --data digits --out 'my fast'\n",
        ),
    ],
)
def test_a_stopped_search_says_the_command_that_goes_on(options, said, monkeypatch, capsys):
    def stopped(network, data, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(nin, "speed", stopped, raising=False)
    arguments = ["speed", "timm:resnet18", "--data", "digits", *options]
    monkeypatch.setattr("sys.argv", ["nin", *arguments])
    with pytest.raises(SystemExit) as ended:
        app.main(arguments)
    assert ended.value.code == 130
    assert said in capsys.readouterr().err
