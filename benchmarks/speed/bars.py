"""A search of `nin speed` on one network, and the ratios that count: beside PyTorch eager, and beside the best engine.

    python benchmarks/speed/bars.py NETWORK IMAGES OUT [--weights FILE] [--lose 1.0] [--batch 1 --batch 32] …

The options are those of `nin speed`; OUT is made. Printed are the table, the seconds that the search took, and for each
batch size how many times as fast the fastest within the limit is as the original in PyTorch eager and as the best of
{ONNX Runtime, OpenVINO} × {float32, int8} without narrowing within the same limit, with the ratios' intervals.
"""

import argparse
import time
from pathlib import Path

import nin
from nin.speed_search.combinations import ORIGINAL
from nin.speed_search.result import Row, SpeedResult, within

RIVALS = {("onnxruntime", "float32"), ("onnxruntime", "int8"), ("openvino", "float32"), ("openvino", "int8")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network")
    parser.add_argument("images")
    parser.add_argument("out", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--lose", type=float, default=1.0)
    parser.add_argument("--batch", type=int, action="append")
    parser.add_argument("--budgets", default="0.8,0.65,0.5")
    parser.add_argument("--finetune", type=int, default=0)
    parser.add_argument("--data-dir", type=Path)
    options = parser.parse_args()
    start = time.monotonic()
    found = nin.speed(
        options.network,
        options.images,
        lose=options.lose,
        batches=options.batch or (1,),
        budgets=[float(share) for share in options.budgets.split(",") if share],
        finetune=options.finetune,
        weights=options.weights,
        data_dir=options.data_dir,
        out=options.out,
        on_progress=lambda text, done, total: print(f"{time.monotonic() - start:.0f} s  {text}  {done}/{total}"),
    )
    print(found)
    print(f"searched for {time.monotonic() - start:.0f} s; load {found.machine['load']}")
    for batch in found.batches:
        print(f"batch {batch}: {ratios(found, batch)}")


def ratios(found: SpeedResult, batch: int) -> str:
    """Return how many times as fast the fastest is as the original, and as the best engine without narrowing."""
    allowed = within(found.rows, found.lose, batch)
    fastest = min(allowed, key=lambda row: row.latency[batch].median)
    rivals = [
        row
        for row in allowed
        if row.combination.form == ORIGINAL and (row.combination.engine, row.combination.number) in RIVALS
    ]
    text = f"{fastest.combination}: {ratio(found.original, fastest, batch)} beside PyTorch eager"
    if rivals:
        best = min(rivals, key=lambda row: row.latency[batch].median)
        text += f", {ratio(best, fastest, batch)} beside {best.combination}"
    return text


def ratio(slower: Row, faster: Row, batch: int) -> str:
    a, b = slower.latency[batch], faster.latency[batch]
    return f"{a.median / b.median:.2f} × ({a.low / b.high:.2f} to {a.high / b.low:.2f})"


if __name__ == "__main__":
    main()
