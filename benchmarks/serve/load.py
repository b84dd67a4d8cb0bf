"""Load of `/api/predict` on the loopback address: many clients, each asking again as soon as it has its answer.

    python benchmarks/serve/load.py RUN --clients 32 --seconds 60 --images 1

With more than one image they are sent in a form. It starts its own server in a process of its own, sends images that
it draws itself, stops by itself, and prints JSON: images in a second, latency, errors, the server's memory after 10
seconds of load and at the end. In turn with the load, in three rounds, `Classifier.predict` reads and classifies the
same images in this process, in batches of as many as there are clients, or as a form holds where that is more; the
ratio is that of the medians.
"""

import argparse
import io
import json
import platform
import statistics
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

ROUNDS = 3


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


def request(files: list[bytes]) -> tuple[bytes, str]:
    """Return body and content type: one image as it is, several in a form."""
    if len(files) == 1:
        return files[0], "image/png"
    head = 'Content-Disposition: form-data; name="images"; filename="image.png"\r\nContent-Type: image/png\r\n\r\n'
    parts = [b"--parts\r\n" + head.encode() + file + b"\r\n" for file in files]
    return b"".join(parts) + b"--parts--\r\n", "multipart/form-data; boundary=parts"


def ask(port: int, files: list[bytes], end: float) -> tuple[list[float], int]:
    """Send a request again and again; return the seconds of each answer and the number of errors."""
    body, kind = request(files)
    connection, times, errors = HTTPConnection("127.0.0.1", port, timeout=60), [], 0
    while time.monotonic() < end:
        began = time.perf_counter()
        connection.request("POST", "/api/predict", body, {"Content-Type": kind})
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


def load(port: int, sent: list[list[bytes]], seconds: float) -> list[tuple[list[float], int]]:
    """Let a client for each of ``sent`` ask for some time; return what `ask` gives of each."""
    end = time.monotonic() + seconds
    with ThreadPoolExecutor(len(sent)) as pool:
        return [one.result() for one in [pool.submit(ask, port, files, end) for files in sent]]


def main(run: Path, clients: int, seconds: float, images: int) -> dict[str, object]:
    """Measure and return what is printed."""
    classifier = nin.load(run)
    p = classifier.info.preprocessing
    files = draw_images(max(clients, images), p.size, p.channels)
    sent = [[files[(i + j) % len(files)] for j in range(images)] for i in range(clients)]
    process, port = start(run)
    results, served, alone, memory = [], [], [], []
    try:
        results += load(port, sent, min(10, seconds / 2))
        memory.append(memory_mib(process))
        for _ in range(ROUNDS):
            alone.append(in_python(classifier, files, seconds / 12))
            found = load(port, sent, seconds / ROUNDS)
            served.append(images * sum(len(times) for times, _ in found) / (seconds / ROUNDS))
            results += found
            memory.append(memory_mib(process))
    finally:
        process.terminate()
        process.wait(timeout=30)
    times = sorted(t for found, _ in results for t in found)
    return {
        "model": classifier.info.recipe.get("model"),
        "clients": clients,
        "images_in_a_request": images,
        "seconds": seconds,
        "images_per_second": [round(rate, 1) for rate in served],
        "python_images_per_second": [round(rate, 1) for rate in alone],
        "ratio": round(statistics.median(served) / statistics.median(alone), 3),
        "requests": len(times),
        "errors": sum(errors for _, errors in results),
        "latency_ms": {q: round(1000 * times[int(q[1:]) * len(times) // 100], 1) for q in ("p20", "p50", "p80", "p99")},
        "memory_mib_after_10_s_and_each_round": [round(size, 1) for size in memory],
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "environment": environment(),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--images", type=int, default=1, help="in a request, up to 64")
    arguments = parser.parse_args()
    limits = (min(arguments.clients, 64), min(arguments.seconds, 600), min(arguments.images, 64))
    print(json.dumps(main(arguments.run, *limits), indent=2))
