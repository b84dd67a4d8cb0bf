"""Load of `/api/predict` on the loopback address: many clients, each asking again as soon as it has its answer.

    python benchmarks/serve/load.py RUN --clients 32 --seconds 60

It starts its own server in a process of its own, sends images that it draws itself, stops by itself, and prints JSON:
images in a second, latency, errors, the server's memory after 10 seconds and at the end, and beside it how many images
in a second `Classifier.predict` reads and classifies in this process, in batches of as many as there are clients.
"""

import argparse
import io
import json
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from threading import Thread

import numpy as np
import torch
from PIL import Image

import nin
from nin.checkpoint import environment


def draw_images(count: int, size: int, channels: int) -> list[bytes]:
    """Return PNG files of random pixels."""
    files = []
    for seed in range(count):
        array = np.random.default_rng(seed).integers(0, 256, (size, size, channels), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(array[:, :, 0] if channels == 1 else array).save(file, "PNG")
        files.append(file.getvalue())
    return files


def start(run: Path) -> tuple[subprocess.Popen[str], int]:
    """Return the server's process and its port."""
    command = [sys.executable, "-m", "nin", "serve", str(run), "--no-browser", "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    line = process.stderr.readline()
    Thread(target=process.stderr.read, daemon=True).start()
    return process, int(line.split()[0].rstrip("/").rpartition(":")[2])


def memory_mib(process: subprocess.Popen[str]) -> float:
    """Return the resident memory of a process, on Linux."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def ask(port: int, file: bytes, end: float) -> tuple[list[float], int]:
    """Send one image again and again; return the seconds of each answer and the number of errors."""
    connection, times, errors = HTTPConnection("127.0.0.1", port, timeout=60), [], 0
    while time.monotonic() < end:
        began = time.perf_counter()
        connection.request("POST", "/api/predict", file, {"Content-Type": "image/png"})
        answer = connection.getresponse()
        answer.read()
        times.append(time.perf_counter() - began)
        errors += answer.status != 200
    connection.close()
    return times, errors


def in_python(classifier: nin.Classifier, files: list[bytes], seconds: float) -> float:
    """Return images in a second through `Classifier.predict`, after a warm-up."""
    classifier.predict(files)
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        classifier.predict(files)
        count += len(files)
    return count / (time.perf_counter() - began)


def main(run: Path, clients: int, seconds: float) -> dict[str, object]:
    """Measure and return what is printed."""
    classifier = nin.load(run)
    p = classifier.info.preprocessing
    files = draw_images(clients, p.size, p.channels)
    before = in_python(classifier, files, seconds / 6)
    process, port = start(run)
    try:
        end = time.monotonic() + seconds
        with ThreadPoolExecutor(clients) as pool:
            asked = [pool.submit(ask, port, file, end) for file in files]
            time.sleep(min(10, seconds / 2))
            early = memory_mib(process)
            results = [one.result() for one in asked]
        late = memory_mib(process)
    finally:
        process.terminate()
        process.wait(timeout=30)
    after = in_python(classifier, files, seconds / 6)
    times = sorted(t for found, _ in results for t in found)
    served, alone = len(times) / seconds, max(before, after)
    return {
        "model": classifier.info.recipe.get("model"),
        "clients": clients,
        "seconds": seconds,
        "images_per_second": round(served, 1),
        "python_images_per_second": [round(before, 1), round(after, 1)],
        "ratio": round(served / alone, 3),
        "errors": sum(errors for _, errors in results),
        "latency_ms": {q: round(1000 * times[int(q[1:]) * len(times) // 100], 1) for q in ("p20", "p50", "p80", "p99")},
        "memory_mib_after_10_s": round(early, 1),
        "memory_mib_at_end": round(late, 1),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "environment": environment(),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60)
    arguments = parser.parse_args()
    print(json.dumps(main(arguments.run, min(arguments.clients, 64), min(arguments.seconds, 600)), indent=2))
