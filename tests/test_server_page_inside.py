"""Looking inside on the page: two runs beside each other, layers narrowed, GoogLeNet, and the copy on a disk."""

import json
import re

import pytest
import torch
from playwright.sync_api import expect

import nin
from nin import checkpoint, models, server
from nin.errors import UserError
from nin.narrowing import LayerPlan, Plan
from nin.profiling import bottleneck_timing
from nin.runtime.timer import time_interleaved
from nin.server import activations, js_bundle, pca, static_export, static_files
from support.browser import Visit, needs_chromium, slide
from support.serving import Running, make_run, numbers, pictures, png, post


def make_narrowed(folder, run):
    """Write a run folder with the network of another, its first 1×1 layer taken apart."""
    folder.mkdir()
    model, info = checkpoint.load_model(run)
    plan = Plan((LayerPlan("blocks.0.0.2", "output", None, 12, 64, 64),), (), "macs", 0.5)
    description = checkpoint.narrowed_description(info.model, plan)
    values = {**vars(info), "model": description, "result": {}}
    checkpoint.save_model(folder, nin.apply_plan(model, plan), checkpoint.RunInfo(**values))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("beside")
    run = make_run(folder / "before")
    return run, make_narrowed(folder / "after", run)


@pytest.fixture(scope="module")
def both(runs):
    served = Running(server.create_app(runs[0], beside=runs[1]))
    for run in served.app.state.service.runs:
        run.samples.thread.join(timeout=60)
    yield served
    served.stop()


def test_both_runs_answer_for_themselves(both, runs):
    (file,) = pictures(1)
    with both.client() as client:
        assert client.get("/api/health").json()["beside"] is True
        names = [client.get(f"/api/model?run={i}").json()["name"] for i in (0, 1)]
        assert names == ["nin_digits", "nin_digits, narrowed"]
        for number, run in enumerate(runs):
            (expected,) = nin.load(run).scores(file)
            answer = post(client, file, path=f"/api/predict?run={number}").json()["predictions"][0]
            assert list(answer["scores"].values()) == pytest.approx(expected.tolist(), abs=1e-5)
        assert client.get("/api/model?run=2").status_code == 422


def test_a_run_alone_has_none_beside_it(runs):
    served = Running(server.create_app(runs[0]))
    with served.client() as client:
        for path in ("model", "dead", "layers/1/weights", "layers/1/spectrum"):
            answer = client.get(f"/api/{path}?run=1")
            assert (answer.status_code, "--beside" in answer.json()["detail"]) == (404, True)
    served.stop()


def test_runs_of_other_classes_are_a_users_error(tmp_path):
    one = make_run(tmp_path / "one")
    other = make_run(tmp_path / "other", classes=tuple("abcdefghij"))
    with pytest.raises(UserError, match="must know the same classes"):
        server.create_app(one, beside=other)


def test_spectra_and_right_answers_are_served(both):
    run = both.app.state.service.runs[0]
    x, labels = run.calibration_batch()
    with both.client() as client:
        answer = client.get("/api/layers/2/spectrum").json()
        found = pca.principal_components(run.network, x, 2)
        torch.testing.assert_close(numbers(answer["variances"]), found.variances.float())
        assert (answer["pixels"], answer["images"]) == (64, 256)
        told = client.get("/api/layers/2/narrowed?rank=5").json()
        scores = pca.narrowed_scores(run.network, x, 2, found, 5)
        assert told["right"] == int((scores.argmax(1) == labels).sum())
        with torch.inference_mode():
            assert told["right_before"] == int((run.network(x).argmax(1) == labels).sum())
        for index in (0, 4, 99):
            assert client.get(f"/api/layers/{index}/spectrum").status_code == 404
        for rank in (0, 5000, "x"):
            assert client.get(f"/api/layers/2/narrowed?rank={rank}").status_code == 422


def first_image(served, number):
    """Return a run's network and its input for the image that the page shows first."""
    run = served.app.state.service.runs[number]
    sample = served.app.state.service.runs[0].samples.shown[0]
    return run.network, run.classifier.inputs(nin.data.decode(sample.png, size=8, channels=1)[None])


@needs_chromium
def test_two_runs_beside_each_other_show_the_same_place(browser, both, runs):
    made = Visit(browser, both)
    inside = made.page.locator("#inside")
    expect(inside.locator("[data-paths] h3")).to_have_count(2)
    expect(inside.locator("[data-paths] h3").nth(1)).to_contain_text("Run after: class")
    for number, run in enumerate(runs):
        (expected,) = nin.load(run).predict(both.app.state.service.runs[0].samples.shown[0].png)
        shown = inside.locator(".look").nth(number).locator(f'[data-confidence="{expected.label}"]')
        assert float(shown.get_attribute("value")) == pytest.approx(100 * expected.confidence, abs=1e-3)
    inside.get_by_role("button", name="block 1, 1×1 (1)").click()
    expect(inside).to_contain_text("run after, 8×8 pixels, 64 channels by way of 12")
    inside.locator('[data-channel="7"]').first.click()
    expect(inside.locator("[data-paths] h3").nth(1)).to_contain_text("Run after: channel 8 at row 5, column 5")
    for number, place in ((0, "block 1, 1×1 (1)"), (1, "block 1, 1×1 (1)")):
        network, x = first_image(both, number)
        index = [layer.place for layer in activations.layers(network)].index(place)
        total = float(inside.locator("[data-paths] [data-sum]").nth(number).get_attribute("value"))
        assert total == pytest.approx(
            activations.layer_activations(network, x, index, sums=True)[0, 7, 4, 4].item(), abs=1e-4
        )
    inside.get_by_role("button", name="test image 2, a 1").click()
    expect(inside.locator(".look").nth(1)).to_contain_text("it is: 1")
    made.close()


def read_pixels(canvas):
    """Return the transparency that a map was drawn with, from 0 to 1."""
    return canvas.evaluate(
        "(one) => Array.from(one.getContext('2d').getImageData(0, 0, one.width, one.height).data)"
        ".filter((_, i) => i % 4 === 3).map((value) => value / 235)"
    )


@needs_chromium
def test_a_layer_narrowed_is_what_pytorch_rebuilds(browser, both):
    made = Visit(browser, both)
    inside = made.page.locator("#inside")
    inside.get_by_role("button", name="block 1, 1×1 (1)").click()
    narrowed = inside.locator("[data-narrowed]")
    expect(narrowed.get_by_role("heading")).to_have_text("How it would look narrowed")
    expect(narrowed).to_contain_text("64 → 1×1 → r → 1×1 → 64")
    inside.locator('[data-channel="5"]').first.click()
    rank = 9
    slide(made.page, "r, channels between:", rank)
    run = both.app.state.service.runs[0]
    found = run.principal_components(2)
    shares = found.variances.cumsum(0) / found.variances.sum()
    share = float(narrowed.locator("[data-kept]").get_attribute("value"))
    assert share == pytest.approx(100 * shares[rank - 1].item(), abs=1e-3)
    assert float(narrowed.locator("[data-macs]").get_attribute("value")) == 64 * (64 * rank + rank * 64)
    expect(narrowed).to_contain_text("It stops paying at r = 32.")
    network, x = first_image(both, 0)
    sums = activations.layer_activations(network, x, 2, sums=True)
    rebuilt = pca.low_rank_output(sums, found, rank, "relu")[0, 5]
    limit = sums[0, 5].relu().max()
    drawn = torch.tensor(read_pixels(narrowed.locator(".trio canvas").nth(1)))
    torch.testing.assert_close(drawn, (rebuilt.flatten() / limit).clamp(max=1), atol=0.01, rtol=0)
    # all of them, to the last digit, from the module itself
    got = made.page.evaluate(
        """async ([rank]) => {
            const [n, s] = [await import('/low-rank.js'), await import('/api-client.js')];
            const { samples } = await s.samples();
            const bytes = Uint8Array.from(atob(samples[0].image.split(',')[1]), (letter) => letter.charCodeAt(0));
            const sums = await s.sums({ blob: new Blob([bytes], { type: 'image/png' }) }, 2, 0);
            const found = await s.spectrum(2, 0);
            const z = n.coordinates(sums, found);
            return ['relu', 'gelu', 'silu', 'none'].map((name) =>
                Array.from(n.rebuild(z, sums.shape, found, rank, name).values));
        }""",
        [rank],
    )
    for values, name in zip(got, ("relu", "gelu", "silu", "none"), strict=True):
        expected = pca.low_rank_output(sums, found, rank, name)[0]
        assert values == pytest.approx(expected.flatten().tolist(), abs=1e-5)
    slide_end(made.page, rank)
    told = (
        pca.narrowed_scores(network, run.calibration_batch()[0], 2, found, rank).argmax(1) == run.calibration_batch()[1]
    )
    expect(narrowed.locator("[data-right]")).to_contain_text(f"{int(told.sum())} of 256 test images")
    narrowed.get_by_label("Show all maps above this way").check()
    above = torch.tensor(read_pixels(inside.locator(".channels canvas").nth(5)))
    limit = sums.relu().max()
    torch.testing.assert_close(above, (rebuilt.flatten() / limit).clamp(max=1), atol=0.01, rtol=0)
    inside.get_by_role("button", name="block 1, max pooling").click()
    expect(narrowed).to_be_hidden()
    made.close()


def slide_end(page, value):
    """Let go of the slider."""
    slide(page, "r, channels between:", value)
    page.get_by_label("r, channels between:", exact=True).evaluate("(one) => one.dispatchEvent(new Event('change'))")


@needs_chromium
def test_channels_are_paired_by_what_they_show(browser, both):
    made = Visit(browser, both)
    torch.manual_seed(0)
    base, other = torch.randn(3, 6, 6), torch.randn(5, 6, 6)
    other[3] = 2 * base[1] + 0.1 * torch.randn(6, 6)
    got = made.page.evaluate(
        """async ([base, other]) => {
            const { mostAlike } = await import('/feature-maps.js');
            const output = (values, channels) => ({ shape: [channels, 6, 6], values: Float32Array.from(values) });
            return mostAlike(output(base, 3), 1, output(other, 5));
        }""",
        [base.flatten().tolist(), other.flatten().tolist()],
    )
    assert got["channel"] == 3
    expected = torch.corrcoef(torch.stack([base[1].flatten(), other[3].flatten()]))[0, 1].item()
    assert got["correlation"] == pytest.approx(expected, abs=1e-5)
    made.close()


@pytest.fixture
def googlenet_run(tmp_path, monkeypatch):
    """A run folder of a small GoogLeNet, and a small folder of images that it was trained on."""
    inceptions = ((192, 8, 6, 8, 4, 4, 4), None, (24, 200, 4, 300, 4, 300, 224))
    monkeypatch.setattr(models.GoogLeNet, "INCEPTIONS", inceptions)
    for label in ("left", "right"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for i in range(6):
            (tmp_path / "photos" / label / f"{i}.png").write_bytes(png((20 * i, 90, 200), (40, 40), "RGB"))
    torch.manual_seed(0)
    model = models.googlenet(2)
    images = nin.data.load(str(tmp_path / "photos"), size=32)
    info = checkpoint.RunInfo(
        model=checkpoint.model_description(model),
        classes=("left", "right"),
        preprocessing=checkpoint.Preprocessing(32, 3, (0.5, 0.4, 0.3), (0.2, 0.2, 0.2)),
        recipe={"model": "googlenet"},
        data={"name": "photos", **images.origin},
        result={},
        environment={},
    )
    (tmp_path / "run").mkdir()
    checkpoint.save_model(tmp_path / "run", model, info)
    return tmp_path / "run"


@needs_chromium
def test_inception_modules_are_looked_into(browser, googlenet_run):
    served = Running(server.create_app(googlenet_run))
    served.app.state.service.runs[0].samples.thread.join(timeout=60)
    made = Visit(browser, served)
    inside = made.page.locator("#inside")
    expect(inside.locator("[data-paths] h3")).to_contain_text("class")
    run = served.app.state.service.runs[0]
    x = run.classifier.inputs(nin.data.decode(run.samples.shown[0].png, size=32, channels=3)[None])
    layers = activations.layers(run.network)
    total = float(inside.locator("[data-paths] [data-sum]").get_attribute("value"))
    maps = activations.layer_activations(run.network, x, len(layers) - 1)[0]
    channel = int(maps.mean((1, 2)).argmax())  # that of the answer is shown first
    assert total == pytest.approx(maps[channel, maps.shape[1] // 2, maps.shape[2] // 2].item(), abs=1e-4)
    inside.get_by_role("button", name="inception 3a, joined").click()
    inside.locator('[data-channel="17"]').click()
    expect(inside.locator("[data-paths]")).to_contain_text("channel 2 of inception 3a, 5×5")
    value = float(inside.locator("[data-paths] [data-value]").get_attribute("value"))
    joined = [layer.name for layer in layers].index("inception 3a, joined")
    assert value == pytest.approx(activations.layer_activations(run.network, x, joined)[0, 17, 2, 2].item(), abs=1e-4)
    inside.get_by_role("button", name="inception 3a, before the 5×5, 1×1").click()
    expect(inside.locator("[data-narrowed]")).to_contain_text("192 → 1×1 → r → 1×1 → 4")
    made.close()
    served.stop()


class OnDisk:
    """Stands for a server in `Visit` where the page comes from a folder."""

    def __init__(self, folder):
        self.url = folder.as_uri()


@pytest.fixture(scope="module")
def copied(runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("copy") / "page"
    patch = pytest.MonkeyPatch()
    patch.setattr(bottleneck_timing, "PIXELS", 4)
    patch.setattr(bottleneck_timing, "time_until_steady", lambda each: (time_interleaved(each, runs=3), True))
    told = []
    index = server.export_page(runs[0], folder, beside=runs[1], on_progress=lambda *progress: told.append(progress))
    patch.undo()
    assert index == folder / "index.html"
    assert told[-1][1] == told[-1][2] == len(told) == len(list((folder / "data").iterdir()))
    return folder


@needs_chromium
def test_the_copy_opens_from_the_disk(browser, copied, both):
    made = Visit(browser, OnDisk(copied), path="/index.html")
    page = made.page
    page.wait_for_selector("html[data-ready]")
    expect(page.locator("#network .best")).to_have_count(1)
    expect(page.locator("#colours [data-said]")).not_to_be_empty()
    assert page.locator(".problem:visible").count() == 0
    slide(page, "filters:", 192)
    expect(page.locator("#shrinking data").first).to_have_text("28,901,376")
    step = page.locator("#bottleneck")
    expect(step.get_by_role("button")).to_have_count(1)
    step.get_by_role("button", name="Show what was measured").click()
    expect(step).to_contain_text("when this copy was written. Measuring on your machine needs nin serve.")
    inside = page.locator("#inside")
    assert inside.locator("input[type=file]").count() == 0
    for name, index, channels in (
        ("block 1, 3×3", 1, 64),
        ("block 1, max pooling", 4, 64),
        ("block 2, 1×1 (1)", 6, 128),
    ):
        inside.get_by_role("button", name=name).click()
        expect(inside.locator("[data-paths] > div").first).to_contain_text(f"{name}, {channels} channels (this one)")
        inside.locator('[data-channel="3"]').first.click()
        expect(inside.locator("[data-paths] h3").first).to_contain_text("channel 4")
        network, x = first_image(both, 0)
        expected = activations.layer_activations(network, x, index)[0, 3]
        place = expected.shape[0] // 2
        value = float(inside.locator("[data-paths] [data-value]").first.get_attribute("value"))
        # numbers of 16 bits; those of 1×1 convolutions are computed in the browser
        assert value == pytest.approx(expected[place, place].item(), abs=1e-4 * float(expected.abs().max()))
    inside.get_by_label("Show the mistakes of run before").check()
    expect(inside.locator("fieldset legend")).to_contain_text("among 24 test images")
    inside.get_by_label("Show the mistakes of run before").uncheck()
    expect(inside.locator("[data-right]")).to_contain_text("nin serve")
    inside.get_by_role("button", name="test image 2, a 1").click()
    expect(inside.locator(".look").nth(1)).to_contain_text("it is: 1")
    made.close()


def test_the_copy_says_what_the_server_says(copied, both):
    text = (copied / "data" / "page.js").read_text()
    start = '(globalThis.ninSaved ??= {})["page"] = '
    assert text.startswith(start)
    content = json.loads(text.removeprefix(start).rstrip(";\n"))
    with both.client() as client:
        for number in (0, 1):
            assert content["models"][number] == client.get(f"/api/model?run={number}").json()
        assert content["dead"][0] == client.get("/api/dead").json()
        samples = client.get("/api/samples").json()
        assert content["samples"] == samples
        assert content["health"] == client.get("/api/health").json()
    assert len(content["predictions"][1]) == len(samples["samples"])


def test_a_copy_has_a_bound(copied, both, monkeypatch):
    """Weights, directions and activations in two bytes each, 1×1 convolutions' activations not at all."""
    service = both.app.state.service
    for number, run in enumerate(service.runs):
        shapes = activations.layers(run.network)
        sums = activations.all_layer_sums(run.network, first_image(both, number)[1])
        written = [
            s.numel() for one, s in zip(shapes, sums, strict=True) if one.kind != "convolution" or one.kernel_size > 1
        ]
        sizes = [path.stat().st_size for path in (copied / "data").glob(f"run-{number}-image-*.js")]
        assert len(sizes) == 24
        assert max(sizes) <= 2 * 4 / 3 * sum(written) + 200 * len(shapes)
        for index, one in enumerate(shapes):
            if one.kind == "convolution":
                count = one.channels * one.in_channels * one.kernel_size**2 + one.channels**2
                size = (copied / "data" / f"run-{number}-layer-{index}.js").stat().st_size
                assert size <= 2 * 4 / 3 * count + 20 * one.channels + 1000
    for limit, count in ((1, static_export.MIN_IMAGES), (10**12, 24)):
        monkeypatch.setattr(static_export, "MAX_BYTES", limit)
        assert len(static_export._fitting_samples(service)) == count


def test_a_copy_takes_only_its_own_folder(copied, runs, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="it holds something else"):
        server.export_page(runs[0], tmp_path / "mine")
    gone = make_run(tmp_path / "gone", source=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="needs the test images of gone"):
        server.export_page(gone, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_server_and_server_offline_export_the_same():
    files = {
        address.strip("/"): content.decode()
        for address, (_, content) in static_files.read_page().items()
        if address.endswith(".js")
    }
    names = [set(js_bundle.exports(files[name])) for name in ("api-client.js", "api-client-offline.js")]
    assert names[0] == names[1]


def test_no_module_imports_or_exports_what_nobody_uses():
    files = {a.strip("/"): c.decode() for a, (_, c) in static_files.read_page().items() if a.endswith(".js")}
    imported = set()
    for name, text in files.items():
        for found in js_bundle.IMPORT.finditer(text):
            names = [part.split(" as ") for part in (found["names"] or "").strip().split(", ") if part]
            imported |= {(found["module"], first) for first, *_ in names}
            for local in [found["whole"]] if found["whole"] else [names[-1] for names in names]:
                assert len(re.findall(rf"\b{local}\b", text)) > 1, f"{name} does not use {local}"
                if found["whole"]:
                    imported |= {(found["module"], one) for one in re.findall(rf"\b{local}\.(\w+)", text)}
    for name, text in files.items():
        unused = {one for one in js_bundle.exports(text) if (name, one) not in imported}
        assert unused == set() or name == "api-client-offline.js", f"{name} exports {unused} to nobody"


def test_bundling_keeps_names_and_order():
    files = {
        "a.js": 'import { two as zwei } from "./b.js";\nimport * as c from "./c.js";\nexport const a = zwei + c.one;\n',
        "b.js": 'import { one } from "./c.js";\nexport const two = one + one;\n',
        "c.js": "export const one = 1;\nexport function f() {}\n",
    }
    text = js_bundle.bundle("a.js", files.__getitem__, {})
    assert [text.index(f"// {name}") for name in ("c.js", "b.js", "a.js")] == sorted(
        text.index(f"// {n}") for n in files
    )
    assert "const {two: zwei}" in text.replace("{ ", "{").replace(" }", "}")
    assert "return { one, f };" in text
    assert "import" not in text
    with pytest.raises(ValueError, match="cannot be bundled: export default"):
        js_bundle.bundle("x.js", {"x.js": "export default 7;\n"}.__getitem__, {})
    circle = {"x.js": 'import { y } from "./y.js";\n', "y.js": 'import { x } from "./x.js";\n'}
    with pytest.raises(ValueError, match=r"x\.js → y\.js → x\.js"):
        js_bundle.bundle("x.js", circle.__getitem__, {})
