"""The processes of a job that torchrun started: which one this is, and the few things that they tell each other."""

from __future__ import annotations

import contextlib
import datetime
import gc
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nin.errors import UserError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

# A process that answers nothing for so long is taken for dead. One that ends is noticed at once.
TIMEOUT = datetime.timedelta(minutes=10)


def count() -> int:
    """Return how many processes the job has; 1 where torchrun started none."""
    return dist.get_world_size() if are_together() else int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return which process of the job this is, from 0."""
    return dist.get_rank() if are_together() else int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Return which of the job's processes on this machine this is, from 0: its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Return how many of the job's processes run on this machine; 1 where torchrun started none."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_first() -> bool:
    """Return whether this is the process that prints and writes."""
    return rank() == 0


def is_restarted() -> bool:
    """Return whether torchrun started the job again, after one of its processes died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def are_together() -> bool:
    """Return whether the processes of the job have found each other, so that they can tell each other something."""
    return dist.is_available() and dist.is_initialized()


@contextlib.contextmanager
def together(device: torch.device) -> Iterator[None]:
    """Let the processes of the job find each other for the time of the block; nothing happens where there is one.

    Raises:
        UserError: another process died, or did not answer for `TIMEOUT`.
    """
    if count() == 1:
        yield
        return
    # a PyTorch without torch.distributed has none of these
    from torch.distributed.rendezvous import rendezvous

    try:
        store, number, size = next(rendezvous("env://", timeout=TIMEOUT))
        store = _fresh_part(store, number, size)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=number, world_size=size, timeout=TIMEOUT)
        yield
    except RuntimeError as error:
        if not _tells_of_a_lost_process(error):
            raise
        raise UserError(
            f"process {rank()} of {count()} lost the others; one of them died or hangs. What was written before is "
            "kept: go on with the same command and --resume"
        ) from error
    finally:
        if dist.is_initialized():
            # DDP holds the group in cycles; one of gloo's that outlives the interpreter aborts it (pytorch#190489)
            gc.collect()
            dist.destroy_process_group()


def _fresh_part(store: Store, number: int, size: int) -> Store:
    """Return a part of a store that no earlier start of the job has written to; all of its processes agree on it.

    torchrun keeps its store when it starts the job again, and gloo would find the addresses of the dead in it. How
    often a job was started is not the same number on all machines, so process 0 answers whoever asks with a name.
    """
    from torch._C._distributed_c10d import PrefixStore

    mine = uuid.uuid4().hex
    if number > 0:
        store.set(f"nin/{number}", mine)
        name = store.get(f"nin/{mine}").decode()  # waits
        store.set(f"nin/{name}/{number}", "here")
        return PrefixStore(name, store)
    missing, deadline = set(range(1, size)), time.monotonic() + TIMEOUT.total_seconds()
    while missing:
        if time.monotonic() > deadline:
            raise dist.DistStoreError(f"Timed out waiting for {len(missing)} of {size} processes")
        for other in missing:
            if store.check([f"nin/{other}"]):  # by a dead one, perhaps: it will not say that it is here
                store.set(f"nin/{store.get(f'nin/{other}').decode()}", mine)
        missing = {other for other in missing if not store.check([f"nin/{mine}/{other}"])}
        time.sleep(0.01)
    return PrefixStore(mine, store)


def _tells_of_a_lost_process(error: RuntimeError) -> bool:
    """Gloo has no class of its own for it: its errors begin with the source file and line, in brackets."""
    text = str(error)
    return isinstance(error, dist.DistError) or any(
        sign in text for sign in ("gloo/transport", "Connection closed by peer", "Connection reset", "Timed out")
    )


def share(order: Tensor, batch_size: int) -> tuple[Tensor, int]:
    """Return this process's part of an order that all processes know: of every batch each takes every n-th sample.

    Args:
        order: int64 (M,).
        batch_size: of all processes together.

    Returns:
        Its samples, int64 (K,), and its own batch size. Each sample goes to exactly one process.
    """
    first, step = rank(), count()
    if step == 1:
        return order, batch_size
    whole = len(order) // batch_size * batch_size
    mine = order[:whole].view(-1, batch_size)[:, first::step].reshape(-1)
    return torch.cat([mine, order[whole:][first::step]]), len(range(first, batch_size, step))


def total(values: Tensor) -> Tensor:
    """Return the sums over all processes, the same bits in each of them."""
    if are_together():
        values = values.clone()
        dist.all_reduce(values)
    return values


def from_first(compute: Callable[[], str]) -> str:
    """Return, in all processes, what the first of them computes; the others wait for it.

    Raises:
        UserError: the first process's; in all of them.
    """
    if not are_together():
        return compute()
    said = {}
    if dist.get_rank() == 0:
        try:
            said = {"text": compute()}
        except UserError as error:
            said = {"error": str(error)}
    answer = json.loads(gather_text(json.dumps(said))[0])
    if "error" in answer:
        raise UserError(answer["error"])
    return str(answer["text"])


@torch.no_grad()
def take_from_first(model: nn.Module) -> None:
    """Give a model the first process's parameters and buffers, in place, so that it is the same in all to the bit."""
    if are_together():
        for value in model.state_dict().values():
            dist.broadcast(value.detach(), 0)


def gather_text(text: str) -> list[str]:
    """Return what each process has to say, in the order of their ranks."""
    if not are_together():
        return [text]
    # bytes in a tensor, and not PyTorch's gather of objects, which would unpickle what comes over the network
    mine = torch.frombuffer(bytearray(text.encode()) or bytearray(1), dtype=torch.uint8)
    device = torch.device("cuda", local_rank()) if dist.get_backend() == "nccl" else torch.device("cpu")
    length = torch.tensor([len(text.encode())], device=device)
    lengths = [torch.zeros_like(length) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, length)
    longest = max(1, *(int(one) for one in lengths))
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: len(mine)] = mine.to(device)
    texts = [torch.zeros_like(padded) for _ in lengths]
    dist.all_gather(texts, padded)
    return [one.cpu().numpy()[: int(size)].tobytes().decode() for one, size in zip(texts, lengths, strict=True)]
