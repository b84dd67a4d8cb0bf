"""`nin shards`: write an image folder as WebDataset shards."""

from pathlib import Path

import nin
from nin import folders, names
from nin.cli.check import show_findings
from nin.cli.console import ProgressBar, messages, print_json
from nin.config import check_seed
from nin.display.numbers import format_number_of


def shards(
    data: str,
    /,
    *,
    out: Path,
    images_per_shard: int = 10_000,
    test_fraction: float | None = None,
    seed: int = 0,
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Write an image folder as WebDataset shards, for sets of many small files. Goes on where it was stopped.

    Args:
        data: An image folder: DIR/CLASS/*, or DIR/train and DIR/test.
        out: The folder to make: train-000000.tar, …, test-000000.tar, …, and nin-shards.json with the classes.
        images_per_shard: At most so many images in a shard.
        test_fraction: Share of each class for the test shards, where the folder has no test images of its own.
        seed: Of the order of the images, and of what is held out.
        overwrite: Remove the shards that lie in the folder first, whatever they were made from; a folder that holds
            anything else is refused.
        json: Print the names of the shards as JSON on standard output.
    """
    check_seed(seed)
    names.check_source(data)
    folders.check_shards(out, overwrite=overwrite)
    with ProgressBar(f"Reading {data}") as bar:
        paths = nin.data.write_shards(
            data,
            out,
            images_per_shard=images_per_shard,
            test_fraction=test_fraction,
            seed=seed,
            overwrite=overwrite,
            on_progress=bar.on_progress,
            on_findings=show_findings,
        )
    if json:
        print_json({"shards": [str(path) for path in paths]})
    else:
        messages.print(f"{format_number_of(len(paths), 'shard')} in {out}\nUse them:  nin train {out} --out RUN")
