"""Makes the pictures of the page in this documentation: starts `nin serve`, and takes them in Chromium.

    python docs/page_pictures.py RUN NARROWED        (NARROWED made from RUN by nin narrow)

Those of this repository are of the demo: nin train digits --out RUN; nin narrow RUN --data digits --macs 0.5
--finetune 5 --out NARROWED. It needs playwright, and Chromium.
"""

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from playwright.sync_api import Locator, Page, expect, sync_playwright

HERE = Path(__file__).parent
WIDTH = 1280
COLOURS = 64


@contextlib.contextmanager
def served(run: str, beside: str) -> Iterator[str]:
    """Serve two runs beside each other, and yield the address."""
    command = [sys.executable, "-m", "nin", "serve", run, "--beside", beside, "--no-browser", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            yield next(line.split()[0] for line in process.stderr if line.startswith("http"))
        finally:
            process.terminate()


def take(page: Page, name: str, first: Locator, last: Locator, *, margin: int = 14) -> None:
    """Take a picture of the page, over its whole width, from the top of one element to the bottom of another."""
    page.evaluate("scrollTo(0, 0)")
    top, bottom = first.bounding_box(), last.bounding_box()
    assert top is not None
    assert bottom is not None
    clip = {
        "x": 0,
        "y": top["y"] - margin,
        "width": WIDTH,
        "height": bottom["y"] + bottom["height"] - top["y"] + 2 * margin,
    }
    path = HERE / f"page-{name}.png"
    page.screenshot(path=path, clip=clip, full_page=True)  # type: ignore[arg-type]  # a TypedDict of playwright's
    with Image.open(path) as picture:  # few colours take a third of the bytes
        few = picture.convert("RGB").quantize(COLOURS * 4, dither=Image.Dither.NONE)
    few.save(path, optimize=True)
    print(path, few.size)


def draw_three(page: Page, pad: Locator) -> None:
    """Draw a 3 as a person would."""
    pad.scroll_into_view_if_needed()
    box = pad.bounding_box()
    assert box is not None
    points = [
        (0.35, 0.2),
        (0.5, 0.14),
        (0.62, 0.22),
        (0.6, 0.36),
        (0.48, 0.47),
        (0.62, 0.56),
        (0.66, 0.7),
        (0.55, 0.84),
        (0.34, 0.82),
    ]
    for number, (x, y) in enumerate(points):
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=4)
        if number == 0:
            page.mouse.down()
    page.mouse.up()


def take_all(page: Page) -> None:
    """Take every picture."""
    page.add_style_tag(content=".top { position: static !important; }")  # it would lie over what is taken
    lesson, network, inside = (page.locator(f"#{name}") for name in ("many-channels", "network", "inside"))
    take(page, "lesson", lesson.locator(".count"), lesson.locator(".figure"))
    draw_three(page, network.get_by_role("application"))
    take(page, "digit", network.locator(".count"), network.locator(".softmax"))
    expect(inside.locator("[data-paths] h3")).to_have_count(2, timeout=60_000)
    inside.get_by_role("button", name="test image 4,").click()
    inside.get_by_role("button", name="block 1, 1×1 (1)").click()
    narrowed = inside.locator("[data-narrowed]")
    expect(narrowed.locator("[data-right]")).to_contain_text("are right", timeout=60_000)
    take(page, "inside", inside.locator(".count"), inside.get_by_role("group", name="layers"))
    take(page, "narrowed", narrowed.locator("h3"), narrowed.locator("[data-right]"))


def main(run: str, narrowed: str) -> None:
    """Take the pictures of two runs."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with served(run, narrowed) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium)
        page = browser.new_page(
            viewport={"width": WIDTH, "height": 900}, reduced_motion="reduce", color_scheme="light", bypass_csp=True
        )
        page.goto(address)
        page.wait_for_selector("html[data-ready]", timeout=120_000)
        take_all(page)
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
