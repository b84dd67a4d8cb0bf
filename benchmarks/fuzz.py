"""Damages image files and model files in many ways and looks at what nin makes of them.

    OMP_NUM_THREADS=1 python benchmarks/fuzz.py images [--count 10000]
    OMP_NUM_THREADS=1 python benchmarks/fuzz.py models [--count 10000]

Images of every format are damaged by flipped bits, cuts, holes, insertions, splices and lies in their headers; then
`nin check`, `nin train` and `nin predict` take the folder. What cannot be decoded must be what the check lists.
Model files are damaged likewise, config.json also by exchanging values in it and safetensors by lies in its header;
each must load or give the one clear error, and nothing may be executed. Writes `results/fuzz-images.json` and
`results/fuzz-models.json`; exit status 1 if anything else happened.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import io
import json
import random
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nin import checkpoint, data, training
from nin.errors import UserError
from nin.inference import classifier
from nin.runtime.files import write_atomically

RESULTS = Path(__file__).parent / "results"
# What a process that runs what it has read would do.
DANGEROUS = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect")
LIMIT_SECONDS = 10.0


def seed_images() -> list[tuple[str, bytes]]:
    """Return (extension, bytes) of whole images in every format and mode that is read."""
    values = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    colour = Image.fromarray(values)
    saves: list[tuple[str, Image.Image, dict[str, Any]]] = [
        *(("jpg", colour, options) for options in ({}, {"progressive": True}, {"quality": 20})),
        ("jpg", colour.convert("CMYK"), {}),
        *(("png", colour.convert(mode), {}) for mode in ("1", "L", "P", "RGB", "RGBA", "I;16")),
        *(("webp", colour, options) for options in ({}, {"lossless": True})),
        ("webp", colour, {"save_all": True, "append_images": [colour.rotate(90)]}),
        ("gif", colour.convert("P"), {}),
        ("gif", colour, {"save_all": True, "append_images": [colour.rotate(90)]}),
        *(("bmp", colour.convert(mode), {}) for mode in ("1", "L", "RGB")),
        *(("tif", colour, {"compression": name}) for name in ("raw", "tiff_lzw", "tiff_adobe_deflate", "jpeg")),
        ("tif", colour.convert("I;16"), {}),
    ]
    return [(extension, save(image, extension, options)) for extension, image, options in saves]


def save(image: Image.Image, extension: str, options: dict[str, Any]) -> bytes:
    """Return the bytes of an image file."""
    file = io.BytesIO()
    image.save(file, {"jpg": "JPEG", "tif": "TIFF"}.get(extension, extension.upper()), **options)
    return file.getvalue()


def damage(content: bytes, other: bytes, chance: random.Random) -> bytes:
    """Return the bytes with one kind of damage."""
    spoiled = bytearray(content)
    kind = chance.randrange(7)
    place = chance.randrange(len(spoiled))
    if kind == 0:
        for _ in range(chance.choice((1, 3, 10, 100))):
            spoiled[chance.randrange(len(spoiled))] ^= 1 << chance.randrange(8)
    elif kind == 1:
        del spoiled[place:]
    elif kind == 2:
        length = chance.randrange(1, 64)
        spoiled[place : place + length] = bytes(len(spoiled[place : place + length]))
    elif kind == 3:
        spoiled[place:place] = chance.randbytes(chance.randrange(1, 64))
    elif kind == 4:
        spoiled[place:] = other[chance.randrange(len(other)) :]
    elif kind == 5:  # numbers of a header that lie
        place = chance.randrange(min(64, len(spoiled)))
        number = chance.choice((0, 1, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, chance.getrandbits(32)))
        packed = struct.pack(chance.choice("<>") + "I", number)
        spoiled[place : place + 4] = packed[: chance.choice((2, 4))]
    elif content.startswith(b"\x89PNG"):  # a size that lies, with a checksum that does not
        size = [chance.choice((0, 1, 24, 5000, 65535, 2**31 - 1)) for _ in range(2)]
        spoiled[16:24] = struct.pack(">II", *size)
        spoiled[29:33] = struct.pack(">I", zlib.crc32(spoiled[12:29]))
    else:
        del spoiled[place : place + chance.randrange(1, 64)]
    return bytes(spoiled)


def fuzz_images(count: int, chance: random.Random) -> dict[str, Any]:
    """Damage images, and let check, train and predict take them."""
    seeds = seed_images()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary) / "images"
        for number in range(count + 200):
            extension, content = chance.choice(seeds)
            path = root / ("one", "two")[number % 2] / f"{number:05d}.{extension}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if number < 200 else damage(content, chance.choice(seeds)[1], chance))
        unreadable, slowest, crashes = decode_all(root)
        figures = {"files": count + 200, "unreadable": len(unreadable), "slowest_decode_seconds": slowest}
        found = run(["check", str(root), "--size", "24", "--json"])
        listed = {f["path"] for f in json.loads(found.pop("output"))["findings"] if f["kind"] == "unreadable"}
        out = Path(temporary) / "run"
        settings = ("--size", "24", "--model", "nin_digits", "--epochs", "1", "--json")
        trained = run(["train", str(root), "--out", str(out), *settings])
        trained.pop("output")
        lines = (out / "findings.csv").read_text().splitlines() if out.is_dir() else []
        predicted = run(["predict", str(out), str(root), "--csv", str(Path(temporary) / "p.csv")])
        predicted.pop("output")
        rows = len((Path(temporary) / "p.csv").read_text().splitlines()) - 1
        figures |= {
            "listed_by_check": len(listed),
            "listed_as_it_is": listed == unreadable,
            "listed_by_training": sum(",unreadable," in line for line in lines),
            "rows_of_predictions": rows,
            "crashes": crashes,
            "verbs": {"check": found, "train": trained, "predict": predicted},
        }
    ok = listed == unreadable and figures["listed_by_training"] == len(unreadable) and rows == count + 200
    done = all(verb["status"] == 0 for verb in figures["verbs"].values())
    return {"ok": ok and done and not crashes and slowest < LIMIT_SECONDS, **figures}


def decode_all(root: Path) -> tuple[set[str], float, list[str]]:
    """Decode every file: which are refused, the longest time, and errors that are not the clear one."""
    unreadable, slowest, crashes = set(), 0.0, []
    for path in sorted(root.rglob("*.*")):
        started = time.perf_counter()
        try:
            data.decode(path, size=24, channels=3)
        except UserError:
            unreadable.add(path.relative_to(root).as_posix())
        except Exception as error:  # noqa: BLE001, it is what is looked for
            crashes.append(f"{path.name}: {type(error).__name__}: {error}")
        slowest = max(slowest, time.perf_counter() - started)
    return unreadable, slowest, crashes


def run(arguments: list[str]) -> dict[str, Any]:
    """Run a verb; return its status, seconds, largest memory and output."""
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    done = subprocess.run([sys.executable, "-m", "nin", *arguments], capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(arguments[0], done.returncode, done.stderr[-300:], flush=True)
    memory = f"{'at most ' if after == before else ''}{after / 1024:.0f} MB"
    seconds = round(time.perf_counter() - started, 1)
    return {"status": done.returncode, "seconds": seconds, "memory": memory, "output": done.stdout}


def fuzz_models(count: int, chance: random.Random) -> dict[str, Any]:
    """Damage run folders, and load each."""
    executed: collections.Counter[str] = collections.Counter()
    sys.addaudithook(lambda event, _: executed.update([event]) if event in DANGEROUS else None)
    results: collections.Counter[str] = collections.Counter()
    crashes, slowest = [], 0.0
    with tempfile.TemporaryDirectory() as temporary:
        run, spoiled = Path(temporary) / "run", Path(temporary) / "spoiled"
        whole = make_run(run)
        shutil.copytree(run, spoiled)
        state = {"state.safetensors": whole["state.safetensors"]}
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        executed.clear()
        for _ in range(count):
            name = chance.choice(list(whole))
            (spoiled / name).write_bytes(damage_model(name, whole[name], chance))
            load: Callable[[Path], Any] = checkpoint.load_state if name in state else use
            started = time.perf_counter()
            try:
                load(spoiled)
                results[f"{name}: loaded"] += 1
            except UserError:
                results[f"{name}: refused"] += 1
            except Exception as error:  # noqa: BLE001, it is what is looked for
                crashes.append(f"{name}: {type(error).__name__}: {str(error)[:200]}")
            slowest = max(slowest, time.perf_counter() - started)
            (spoiled / name).write_bytes(whole[name])
        memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    figures = {"files": count, "results": dict(results), "executed": dict(executed), "crashes": crashes[:50]}
    ok = not crashes and not executed and slowest < LIMIT_SECONDS and memory < 1024
    return {"ok": ok, **figures, "slowest_seconds": slowest, "memory_growth_mb": round(memory)}


def use(run: Path) -> None:
    """Load a run folder and classify an image."""
    classifier.load(run).predict(np.zeros((8, 8), dtype=np.uint8))


def make_run(folder: Path) -> dict[str, bytes]:
    """Train for a moment; return the files that are read again."""
    training.train("digits", training.TrainConfig(epochs=1, threads=1), out=folder)
    model, _ = checkpoint.load_model(folder)
    checkpoint.save_state(folder, model.state_dict(), {"step": 1})
    names = (checkpoint.MODEL_FILE, checkpoint.CONFIG_FILE, checkpoint.STATE_FILE)
    return {name: (folder / name).read_bytes() for name in names}


def damage_model(name: str, content: bytes, chance: random.Random) -> bytes:
    """Return a damaged model file."""
    if chance.random() < 0.4:
        return damage(content, chance.randbytes(200), chance)
    if name == checkpoint.CONFIG_FILE:
        return json.dumps(exchange(json.loads(content), chance)).encode()
    length = int.from_bytes(content[:8], "little")
    header = exchange(json.loads(content[8 : 8 + length]), chance)
    text = json.dumps(header).encode()
    length = chance.choice((len(text), len(text), len(text), 0, 2**63, 2**40))
    return length.to_bytes(8, "little") + text + content[8 + len(text) :]


def exchange(values: Any, chance: random.Random) -> Any:
    """Exchange one value, somewhere in nested lists and dictionaries."""
    deep: Any = []
    for _ in range(500):
        deep = [deep]
    strange = (None, -1, 0, 1, 3, 10**6, 10**12, 2**63, 1e300, float("nan"), True, "", "x" * 1000, "../../etc/passwd")
    if isinstance(values, dict) and values and chance.random() < 0.95:
        name = chance.choice(list(values))
        if chance.random() < 0.05:
            return {key: value for key, value in values.items() if key != name}
        return {**values, name: exchange(values[name], chance)}
    if isinstance(values, list) and values and chance.random() < 0.9:
        place = chance.randrange(len(values))
        return [*values[:place], exchange(values[place], chance), *values[place + 1 :]]
    return chance.choice((*strange, [], {}, [values] * 3, {"kind": values}, deep))


def main() -> None:
    """Damage, look, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("images", "models"))
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    fuzz = fuzz_images if arguments.what == "images" else fuzz_models
    figures = fuzz(arguments.count, random.Random(arguments.seed))
    header = {"date": datetime.date.today().isoformat(), "machine": checkpoint.environment()}
    text = json.dumps({**header, "seed": arguments.seed, **figures}, indent=1) + "\n"
    RESULTS.mkdir(exist_ok=True)
    write_atomically(RESULTS / f"fuzz-{arguments.what}.json", text)
    print(text)
    sys.exit(not figures["ok"])


if __name__ == "__main__":
    main()
