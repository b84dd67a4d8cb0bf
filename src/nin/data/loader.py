"""Load batches in a given order; threads decode the images that are not in memory.

Not torch's DataLoader: see `map_in_threads` for the numbers. The order is an argument, so a resumed run goes on in the
middle of an epoch, and a file that vanished is left out of its batch and not drawn again.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from nin.data.dataset import DecodedSet, ImageSet
from nin.runtime import torchrun

T = TypeVar("T")
R = TypeVar("R")


def batches(
    dataset: ImageSet | DecodedSet,
    order: Tensor,
    batch_size: int,
    *,
    workers: int | None = None,
    on_lost: Callable[[str, str], None] | None = None,
    empty: bool = False,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield the samples of a set, in order, batch by batch.

    Args:
        dataset: where the samples come from.
        order: int64 (M,), indices into the set, plus any multiple of its length, which tells apart the times that a
            sample comes up (see `nin.data.balanced_order`). Leave out the first ones to go on in the middle of an
            epoch.
        batch_size: samples in a batch. The last batch holds what is left.
        workers: threads that decode images ahead of the caller, one for each usable core by default; 0
            decodes in the caller's thread. The number changes the speed and nothing else.
        on_lost: called with (path, reason) for each file that cannot be read any more; its batch comes without it.
            None raises.
        empty: yield a batch of which nothing can be read any more, with no images. Processes that share a batch
            must all take the step.

    Yields:
        images, uint8 (B, C, H, W); labels, int64 (B,); what the order holds for them, int64 (B,).

    Raises:
        ValueError: batch_size is below 1.
        UserError: a file cannot be read any more.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    batch_indices = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    threads = workers if isinstance(dataset, DecodedSet) else 0

    def fetch(numbers: Tensor) -> tuple[Tensor, Tensor, list[tuple[str, str]]]:
        if on_lost is None or isinstance(dataset, ImageSet):
            return dataset.fetch(numbers), numbers, []
        return dataset.fetch_readable(numbers)

    for images, kept, lost in map_in_threads(fetch, batch_indices, workers=threads):
        for path, reason in lost:
            assert on_lost is not None
            on_lost(path, reason)
        if len(kept) or empty:
            yield images, dataset.labels[kept % max(1, len(dataset))], kept


def to_device(dataset: ImageSet | DecodedSet, device: torch.device) -> ImageSet:
    """Return the set with all its images decoded, as bytes in the memory of a device.

    Raises:
        UserError: a file cannot be read any more.
    """
    if isinstance(dataset, ImageSet):
        pixels = dataset.images
    else:
        pixels = torch.cat([batch for batch, _, _ in batches(dataset, torch.arange(len(dataset)), 1024)])
    return ImageSet(pixels.to(device), dataset.labels.to(device), dataset.names)


def map_in_threads(function: Callable[[T], R], items: Iterable[T], *, workers: int | None = None) -> Iterator[R]:
    """Map a function over items in threads and yield the results in the order of the items.

    Threads and not processes: Pillow releases the GIL while it decodes and resizes, nothing is copied between
    processes, and the paths are held once. On photographs of 640 x 427 two threads on two cores decoded 814 images/s,
    one 456; on images of 32 x 32, where Python's own work dominates, 8,000 and 11,000. At most 2 * workers + 1 results
    wait in memory; Executor.map would take all items at once (its buffersize is new in Python 3.14).

    Args:
        function: called in the threads.
        items: its arguments.
        workers: threads, one for each usable core by default; 0 calls it in the caller's thread.

    Yields:
        The results.
    """
    workers = usable_cores() if workers is None else workers
    if workers < 1:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="nin-data")
    pending: deque[Future[R]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            # two items for each thread: it takes the next one while the first result waits for the caller
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:  # also where the caller stops early: then it does not wait for all the items
        pool.shutdown(wait=True, cancel_futures=True)


def usable_cores() -> int:
    """Return the number of processor cores for this process; the processes that torchrun started here divide them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // torchrun.local_world_size())
