"""The page in a real browser: every step, by pointer and by keyboard, and its numbers beside PyTorch's."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from playwright.sync_api import expect

from nin import server
from nin.layers import Bottleneck
from nin.profiling import bottleneck_timing
from nin.runtime.timer import time_interleaved
from nin.server import static_files
from support.browser import Visit, needs_chromium, slide
from support.serving import Running, make_run, png

STEPS = ("one-channel", "many-channels", "dense", "shrinking", "bottleneck", "colours", "network")

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    served = Running(server.create_app(make_run(tmp_path_factory.mktemp("page") / "run")))
    yield served
    served.stop()


@pytest.fixture(scope="module")
def lesson():
    served = Running(server.create_app())
    yield served
    served.stop()


@pytest.fixture
def visit(browser, lesson):
    made = Visit(browser, lesson)
    yield made.page
    made.close()


@pytest.fixture
def look(browser, running):
    running.app.state.service.runs[0].samples.thread.join(timeout=60)
    made = Visit(browser, running)
    yield made.page
    made.close()


def values(locator):
    """Return the numbers of <data> elements, with all their digits."""
    return [float(value) for value in locator.locator("data").evaluate_all("all => all.map((one) => one.value)")]


def upload(content):
    return {"name": "<b>x</b>.png", "mimeType": "image/png", "buffer": content}


def test_the_lesson_alone_shows_no_look_inside(visit):
    assert visit.locator("#inside").is_hidden()
    assert visit.locator(".problem:visible").count() == 0


def test_one_channel_scales_and_the_relu_cuts(visit):
    step = visit.locator("#one-channel")
    cells = step.get_by_role("gridcell")
    assert [cells.nth(36 + i).text_content() for i in range(6)] == ["2", "4", "6", "12", "10", "16"]
    weight = step.get_by_role("slider", name="weight")
    weight.focus()
    for _ in range(35):
        visit.keyboard.press("ArrowLeft")  # 2.0 to -1.5
    assert [cells.nth(36 + i).text_content() for i in range(3)] == ["0.0", "0.0", "0.0"]
    step.get_by_label("ReLU").uncheck()
    assert cells.nth(37).text_content() == "−3.0"
    cells.nth(5).hover()
    expect(step.locator("[data-said]")).to_have_text("8 × −1.5 = −12.0.")
    # drawn by the pointer as well
    box = weight.bounding_box()
    visit.mouse.click(box["x"] + box["width"] - 3, box["y"] + box["height"] / 2)
    expect(step.locator(".weight > output")).to_have_text("3.0")


def read_pixel(page):
    step = page.locator("#many-channels")
    rows = [values(step.locator("[data-strip] tr").nth(i)) for i in range(4)]
    total, after = (float(step.locator(f"[data-{name}]").get_attribute("value")) for name in ("sum", "relu"))
    return rows, total, after


def test_many_channels_are_what_pytorch_computes(visit):
    step = visit.locator("#many-channels")
    for turn in range(3):  # new random numbers each time
        block = step.get_by_role("application").first
        box = block.bounding_box()
        block.hover(position={"x": box["width"] * (0.15 + 0.15 * turn), "y": box["height"] * 0.8})
        slide(visit, "look at filter", turn + 2)
        (x, w, products, sums), total, after = read_pixel(visit)
        x, w = torch.tensor(x, dtype=torch.float64), torch.tensor(w, dtype=torch.float64)
        expected = F.conv2d(x.view(1, 32, 1, 1), w.view(1, 32, 1, 1)).item()
        assert total == pytest.approx(expected, abs=1e-5)
        assert after == pytest.approx(max(0, expected), abs=1e-5)
        assert products == pytest.approx((x * w).tolist(), abs=1e-9)
        assert sums == pytest.approx((x * w).cumsum(0).tolist(), abs=1e-9)
        step.get_by_role("button", name="New random numbers").click()


def test_the_lessons_arithmetic_is_pytorchs_for_random_weights(visit):
    torch.manual_seed(3)
    x, w, b = torch.randn(1, 32, 6, 6), torch.randn(16, 32, 1, 1), torch.randn(16)
    image, kernel = torch.randn(1, 1, 8, 8), torch.randn(12, 1, 5, 5)
    given = [
        x.flatten().tolist(),
        w.flatten().tolist(),
        b.tolist(),
        image.flatten().tolist(),
        kernel.flatten().tolist(),
    ]
    got = visit.evaluate(
        """async ([x, w, b, image, kernel]) => {
            const m = await import('/maths.js');
            const convolved = m.convolve(image, 8, 8, kernel, b.slice(0, 12), 5);
            return [m.conv1x1(x, 32, w, b), convolved].map((y) => Array.from(y));
        }""",
        given,
    )
    assert got[0] == pytest.approx(F.conv2d(x, w, b).relu().flatten().tolist(), abs=1e-5)
    assert got[1] == pytest.approx(F.conv2d(image, kernel, b[:12], padding=2).relu().flatten().tolist(), abs=1e-5)


def test_the_output_is_as_deep_as_there_are_filters(visit):
    slide(visit, "filters F:", 40)
    expect(visit.locator("#many-channels")).to_contain_text("output 6×6×40")
    slide(visit, "filters F:", 2)
    expect(visit.locator("#many-channels")).to_contain_text("map 2 of 2")
    expect(visit.locator("#dense")).to_contain_text("Linear(32, 2)")


def test_pixels_are_chosen_by_the_keyboard_and_steps_2_and_3_agree(visit):
    visit.locator("#many-channels [role=application]").first.focus()
    visit.keyboard.press("ArrowDown")
    visit.keyboard.press("ArrowRight")
    expect(visit.locator("#many-channels")).to_contain_text("row 4, column 5")
    _, _, after = read_pixel(visit)
    expect(visit.locator("#dense")).to_contain_text(f"is {after:.3f}")
    visit.locator("#dense [role=grid]").focus()
    visit.keyboard.press("ArrowUp")
    expect(visit.locator("#many-channels")).to_contain_text("row 3, column 5")
    expect(visit.locator("#live")).to_contain_text("Output")  # said to those who do not see it


def test_shrinking_counts(visit):
    data = visit.locator("#shrinking data")
    assert [data.nth(i).get_attribute("value") for i in range(3)] == ["4816896", "6176", "25088"]
    slide(visit, "filters:", 192)
    assert [data.nth(i).text_content() for i in range(2)] == ["28,901,376", "37,056"]


def test_the_bottleneck_counts_and_measures(visit, monkeypatch):
    monkeypatch.setattr(bottleneck_timing, "PIXELS", 4)
    busy = [False, True]
    monkeypatch.setattr(bottleneck_timing, "time_until_steady", lambda each: (time_interleaved(each), busy.pop()))
    step = visit.locator("#bottleneck")
    expect(step).to_contain_text("3.76 times fewer multiplications. It stops paying at r = 241.")
    for r, words in ((240, "1.00 times fewer"), (241, "it stopped paying")):
        slide(visit, "r:", r)
        expect(step).to_contain_text(words)
    layers = Bottleneck(256, 100, 256, kernel_size=4)
    macs = 28 * 28 * sum(p.numel() for name, p in layers.named_parameters() if name.endswith("weight"))
    slide(visit, "r:", 100)
    assert values(step)[0] == macs
    step.get_by_role("button", name="Measure this r here").click()
    expect(step).to_contain_text("Measured:", timeout=20_000)
    expect(step).to_contain_text("median (20th to 80th percentile) of 15 runs")
    assert step.locator(".busy").count() == 0
    slide(visit, "r:", 50)
    step.get_by_role("button", name="Measure this r here").click()
    expect(step).to_contain_text("on a busy machine: not to be relied on", timeout=20_000)
    expect(step).to_contain_text("Hollow dots: their times scattered")
    assert step.locator(".busy").count() == 1


def test_colours_are_mixed_and_learned(visit):
    step = visit.locator("#colours")
    slide(visit, "green", 1.25)
    expect(step.locator("[data-said]")).to_have_text("relu(1.00 · red + 1.25 · green − 0.50 · blue)")
    photo = step.get_by_role("application")
    box = photo.bounding_box()
    photo.click(position={"x": box["width"] * 0.4, "y": box["height"] * 0.4})  # the flower
    expect(step.locator("[data-said]")).to_contain_text("Step 400 of 400", timeout=60_000)
    found = (
        step.locator("canvas")
        .nth(1)
        .evaluate(
            """(canvas) => {
            const {width, height, data} = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
            const at = (x, y) => data[4 * (Math.floor(height * y) * width + Math.floor(width * x))];
            return [at(0.4, 0.4), at(0.03, 0.5)];
        }"""
        )
    )
    assert found[0] > 160  # the petals
    assert found[1] < 60  # the leaves


def test_a_photo_of_the_visitors_stays_in_the_browser(browser, lesson):
    made = Visit(browser, lesson)
    sent = []
    made.page.on("request", lambda request: sent.append(request.url))
    step = made.page.locator("#colours")
    step.locator("input[type=file]").set_input_files(upload(png(size=(40, 30))))
    expect(step.locator("canvas").first).to_have_attribute("width", "40")
    assert [url for url in sent if not url.startswith("blob:")] == []
    step.locator("input[type=file]").set_input_files(upload(b"no image"))
    expect(step.locator(".problem")).to_be_visible()
    made.close()


def test_the_little_network_is_pytorchs(visit):
    content = json.loads(static_files.read_page()["/digits.json"][1])
    step = visit.locator("#network")
    for digit in (0, 7):
        step.get_by_role("button", name=f"digit {digit}").click()
        y = torch.tensor(content["images"][digit], dtype=torch.float64).view(1, 1, 8, 8) / 255
        for i, layer in enumerate(content["layers"]):
            weight, bias = (torch.tensor(layer[name], dtype=torch.float64) for name in ("weight", "bias"))
            shape = (-1, 1, 5, 5) if i == 0 else (*weight.shape, 1, 1)
            y = F.conv2d(y, weight.view(shape), bias, padding=0 if i else 2)
            y = y.relu() if i < 2 else y
        cells = (
            step.locator(".map").first.get_by_role("gridcell").evaluate_all("all => all.map((c) => +c.dataset.value)")
        )
        assert cells == pytest.approx(y[0, 0].flatten().tolist(), abs=1e-5)
        scores = y.mean((0, 2, 3))
        assert values(step.locator(".maps")) == pytest.approx(scores.tolist(), abs=1e-5)
        powers = [scores, scores.exp(), 100 * scores.softmax(0)]
        expected = [*torch.stack(powers, 1).flatten().tolist(), float(scores.exp().sum())]
        assert values(step.locator(".softmax")) == pytest.approx(expected, rel=1e-4, abs=1e-4)
        expect(step.locator(".best")).to_contain_text(f"{digit}: mean")
    step.locator(".digit").focus()
    visit.keyboard.press("ArrowDown")
    expect(step.locator(".said")).to_contain_text("This place says")


def test_a_digit_is_drawn_by_pointer_and_by_keys(visit):
    step = visit.locator("#network")
    pad = step.get_by_role("application")
    pad.scroll_into_view_if_needed()
    box = pad.bounding_box()

    def draw(points):
        for i, (x, y) in enumerate(points):
            visit.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
            if i == 0:
                visit.mouse.down()
        visit.mouse.up()

    circle = [(0.5 + 0.2 * math.cos(i / 4), 0.5 + 0.3 * math.sin(i / 4)) for i in range(26)]
    for digit, points in ((0, circle), (1, [(0.55, 0.2), (0.5, 0.5), (0.5, 0.8)])):
        step.get_by_role("button", name="Clear").click()
        draw(points)
        expect(step.locator(".maps .best")).to_contain_text(f"{digit}: mean")
    # what is drawn small and in a corner is brought to the same size
    cells = "all => all.map((c) => +c.dataset.value)"
    large = step.locator(".digit").get_by_role("gridcell").evaluate_all(cells)
    assert max(large) == 1
    assert step.locator('.choices [aria-pressed="true"]').count() == 0
    step.get_by_role("button", name="Clear").click()
    assert not any(step.locator(".digit").get_by_role("gridcell").evaluate_all(cells))
    pad.focus()
    for key in (" ", *["ArrowDown"] * 5):
        visit.keyboard.press(key)
    assert any(step.locator(".digit").get_by_role("gridcell").evaluate_all(cells))
    step.get_by_role("button", name="digit 4").click()
    expect(step.locator(".maps .best")).to_contain_text("4: mean")


def test_the_pixel_moves_by_itself_until_it_is_stopped(visit):
    step = visit.locator("#many-channels")
    expect(step).to_contain_text("row 3, column 4")
    step.get_by_role("button", name="Move the pixel").click()
    expect(step).to_contain_text("row 3, column 6")
    step.get_by_role("button", name="Stop").click()
    expect(step.get_by_role("button", name="Move the pixel")).to_be_visible()


def test_look_inside_offers_the_mistakes(look, running):
    run, inside = running.app.state.service.runs[0], look.locator("#inside")
    pixels, labels = run.calibration_images()
    wrong = sum(
        p.label != run.classifier.classes[i] for p, i in zip(run.classifier.predict(pixels), labels, strict=True)
    )
    inside.get_by_label("Show its mistakes").check()
    expect(inside.locator("fieldset legend")).to_contain_text(f"{wrong} among 256 test images")
    inside.get_by_role("button", name="mistake 2,").click()
    expect(inside.get_by_role("button", name="mistake 2,")).to_have_attribute("aria-pressed", "true")
    true = inside.get_by_role("button", name="mistake 2,").get_attribute("aria-label")[-1]
    expect(inside.locator(".look")).to_contain_text(f"it is: {true}")
    expect(inside.locator(".answer .first").first).not_to_have_text(true)
    inside.get_by_label("Show its mistakes").uncheck()
    expect(inside.get_by_role("button", name="test image 2, a 1")).to_be_visible()


def test_look_inside_follows_an_image_through_the_network(look, running):
    inside = look.locator("#inside")
    expect(inside.locator("[data-paths] [data-sum]")).to_have_count(1)
    classifier = running.app.state.service.runs[0].classifier
    images = running.app.state.service.runs[0].samples.shown
    (expected,) = classifier.predict(images[0].png)
    shown = inside.locator(f'[data-confidence="{expected.label}"]').first
    assert float(shown.get_attribute("value")) == pytest.approx(100 * expected.confidence, abs=1e-3)
    # every layer: the sum that the browser adds up is the value that the network has there
    for name in ("block 1, 3×3", "block 1, 1×1 (2)", "block 2, 3×3", "block 2, 1×1 (2)"):
        inside.get_by_role("button", name=name).click()
        expect(inside.locator("[data-channel]").first).to_have_attribute("aria-pressed", "true")
        inside.locator('[data-channel="3"]').click()
        expect(inside.locator("[data-paths] h3")).to_contain_text("3" if name.startswith("block 2, 1") else "channel 4")
        total = float(inside.locator("[data-paths] [data-sum]").get_attribute("value"))
        after = inside.locator("[data-paths] [data-value]")
        if after.count():
            assert float(after.get_attribute("value")) == pytest.approx(max(0, total), abs=1e-4)
        else:
            (maps,) = classifier.confidence_maps(images[0].png)
            assert total == pytest.approx(maps[3, 2, 2].item(), abs=1e-4)


def test_the_pixel_is_chosen_by_pointer_and_keyboard(look, running):
    inside = look.locator("#inside")
    overlay = inside.get_by_role("application", name="map of a class over image A")
    box = overlay.bounding_box()
    overlay.hover(position={"x": box["width"] * 0.9, "y": box["height"] * 0.1})
    expect(inside.locator("[data-paths] h3")).to_contain_text("row 1, column 4")
    overlay.focus()
    for _ in range(7):
        look.keyboard.press("ArrowDown")
    expect(inside.locator("[data-paths] h3")).to_contain_text("row 4, column 4")
    classifier, images = running.app.state.service.runs[0].classifier, running.app.state.service.runs[0].samples.shown
    (maps,), (expected,) = classifier.confidence_maps(images[0].png), classifier.predict(images[0].png)
    here = float(inside.locator("[data-map-value]").get_attribute("value"))
    assert here == pytest.approx(maps[classifier.classes.index(expected.label), 3, 3].item(), abs=1e-5)


def test_an_upload_two_images_and_what_is_no_image(look):
    inside = look.locator("#inside")
    inside.get_by_label("Compare with a second image").check()
    expect(inside.locator("[data-paths] h3")).to_have_count(2)
    files = inside.locator("input[type=file]")
    files.nth(1).set_input_files(upload(png(200, (30, 30))))
    expect(inside.locator(".look").nth(1)).to_contain_text("an image of yours")
    inside.get_by_label("Compare with a second image").uncheck()
    expect(inside.locator("[data-paths] h3")).to_have_count(1)


def test_an_upload_that_is_refused_says_why(browser, running):
    made = Visit(browser, running)
    files = made.page.locator("#inside input[type=file]")
    files.set_input_files(upload(b"<b>no</b>"))
    expect(made.page.locator("#inside .problem")).to_contain_text("could not be read: empty, not an image")
    made.context.close()
    assert all("415" in text for text in made.wrong)  # the browser itself logs the status


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_no_violation_of_wcag_and_nothing_wider_than_the_screen(browser, running, scheme, width):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-core is not here").Axe()
    made = Visit(
        browser, running, viewport={"width": width, "height": 800}, color_scheme=scheme, reduced_motion="reduce"
    )
    expect(made.page.locator("#inside [data-paths] h3")).to_have_count(1)
    assert made.page.evaluate("document.documentElement.scrollWidth") == width
    tags = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
    found = axe.run(made.page, options={"runOnly": {"type": "tag", "values": tags}}).response["violations"]
    made.close()
    assert [(v["id"], [n["html"][:150] for n in v["nodes"]][:3]) for v in found] == []


def test_everything_is_reached_by_the_tab_key(visit):
    reached = set()
    for _ in range(100):
        visit.keyboard.press("Tab")
        reached.add(visit.evaluate("document.activeElement.closest('section')?.id"))
    assert set(STEPS) <= reached


def test_the_first_view_is_there_within_a_second(browser, lesson):
    made = Visit(browser, lesson)
    loaded = made.page.evaluate("performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd")
    sizes = made.page.evaluate("performance.getEntriesByType('resource').map((one) => one.transferSize)")
    made.close()
    assert 100_000 < sum(sizes) < 600_000
    assert loaded < 5_000  # 1 s on a machine that does nothing else


def test_the_description_of_the_api_is_a_page(browser, running):
    made = Visit(browser, running, path="/api")
    expect(made.page.get_by_role("heading", name="POST /api/predict")).to_be_visible()
    made.close()
