"""The page's first view and its hover in Chromium: milliseconds and bytes, on the loopback address.

    python benchmarks/serve/first_view.py

It serves the lesson in a process of its own, opens it a few times in a fresh browser context, and prints JSON: when the
document and all figures were there, the bytes that were sent, and the script's time for a hover over the 6×6×32 block.
"""

import json
import shutil
import statistics
import subprocess
import sys

from playwright.sync_api import sync_playwright

VISITS, HOVERS = 9, 120

HOVER = """(block) => {
    const frame = block.getBoundingClientRect(), times = [];
    for (let i = 0; i < HOVERS; i++) {
        const [x, y] = [frame.left + frame.width * (0.1 + 0.1 * (i % 6)), frame.bottom - frame.height * 0.3];
        const start = performance.now();
        block.dispatchEvent(new PointerEvent('pointermove', {clientX: x, clientY: y, bubbles: true}));
        times.push(performance.now() - start);
    }
    return times;
}""".replace("HOVERS", str(HOVERS))


def main() -> dict[str, object]:
    """Measure and return what is printed."""
    command = [sys.executable, "-m", "nin", "serve", "--no-browser", "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    address = process.stderr.readline().split()[0]
    ready, drawn, hovers, sent = [], [], [], 0
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            for _ in range(VISITS):
                page = browser.new_page()
                page.goto(address)
                page.wait_for_selector("html[data-ready]")
                page.wait_for_selector("#network .best")
                drawn.append(page.evaluate("performance.now()"))
                timing = "performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd"
                ready.append(page.evaluate(timing))
                resources = (
                    "[...performance.getEntriesByType('resource'), ...performance.getEntriesByType('navigation')]"
                )
                sent = page.evaluate(f"{resources}.reduce((sum, one) => sum + one.transferSize, 0)")
                hovers += page.locator("#many-channels [role=application]").first.evaluate(HOVER)
                page.close()
            version = browser.version
            browser.close()
    finally:
        process.terminate()
        process.wait(timeout=30)
    hovers.sort()
    return {
        "document_ms": round(statistics.median(ready), 1),
        "figures_ms": round(statistics.median(drawn), 1),
        "slowest_figures_ms": round(max(drawn), 1),
        "bytes": sent,
        "hover_ms": {"median": round(statistics.median(hovers), 2), "p99": round(hovers[len(hovers) * 99 // 100], 2)},
        "chromium": version,
    }


if __name__ == "__main__":
    print(json.dumps(main(), indent=2))
