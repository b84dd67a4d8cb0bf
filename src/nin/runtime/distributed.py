"""torch.distributed for a job of torchrun: rank, world size, process group, all-reduce, broadcast, all-gather.

Every function works without torchrun too: then there is one process, of rank 0.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import json
import time
import uuid
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from nin.errors import UserError
from nin.runtime import torchrun

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

# A process that does not answer for so long counts as dead. One that ends is noticed at once.
TIMEOUT = datetime.timedelta(minutes=10)


def world_size() -> int:
    """Return the number of processes of the job."""
    return dist.get_world_size() if is_initialized() else torchrun.world_size()


def rank() -> int:
    """Return the number of this process in the job, from 0."""
    return dist.get_rank() if is_initialized() else torchrun.rank()


def is_main_process() -> bool:
    """Return whether this is rank 0, which prints and writes."""
    return rank() == 0


def is_initialized() -> bool:
    """Return whether this process is in a process group, so that it can communicate."""
    return dist.is_available() and dist.is_initialized()


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Initialise the job's process group for the time of the block; nothing happens where there is one process.

    Args:
        device: that the tensors are on: NCCL for a GPU, which is the current one in the block; gloo for the CPU.

    Raises:
        UserError: another process died, or did not answer for `TIMEOUT`, or has the same GPU.
    """
    if world_size() == 1:
        yield
        return
    # a PyTorch that was built without torch.distributed lacks this module
    from torch.distributed.rendezvous import rendezvous

    on_gpu = device.type == "cuda"
    try:
        store, number, size = next(rendezvous("env://", timeout=TIMEOUT))
        store = _fresh_prefix_store(store, number, size)
        backend = "nccl" if on_gpu else "gloo"
        # NCCL's own tensors, and those of `_on_backend`, are on the current GPU
        with torch.cuda.device(device) if on_gpu else contextlib.nullcontext():
            dist.init_process_group(backend, store=store, rank=number, world_size=size, timeout=TIMEOUT)
            yield
    except RuntimeError as error:
        if "Duplicate GPU" in str(error):  # NCCL has no class for it
            raise UserError(
                f"process {rank()} of {world_size()} shares its GPU ({device}) with another one, and each must have "
                "its own: start no more processes on a machine than it has GPUs, or give --device cpu"
            ) from error
        if not _is_lost_process_error(error):
            raise
        raise UserError(
            f"process {rank()} of {world_size()} lost the others; one of them died or hangs. What was written before "
            "is kept: go on with the same command and --resume"
        ) from error
    finally:
        if dist.is_initialized():
            # DDP holds the group in cycles; one of gloo's that outlives the interpreter aborts it (pytorch#190489)
            gc.collect()
            dist.destroy_process_group()


def _fresh_prefix_store(store: Store, number: int, size: int) -> Store:
    """Return a part of a store that no earlier start of the job has written to, the same in all processes.

    torchrun keeps its store when it restarts a job, and gloo would read the addresses of dead processes from it. The
    restart count differs between machines and cannot be the prefix, so rank 0 gives a random one to each process that
    asks for it.
    """
    from torch._C._distributed_c10d import PrefixStore

    token = uuid.uuid4().hex
    if number > 0:
        store.set(f"nin/{number}", token)
        prefix = store.get(f"nin/{token}").decode()  # waits
        store.set(f"nin/{prefix}/{number}", "here")
        return PrefixStore(prefix, store)
    missing, deadline = set(range(1, size)), time.monotonic() + TIMEOUT.total_seconds()
    while missing:
        if time.monotonic() > deadline:
            raise dist.DistStoreError(f"Timed out waiting for {len(missing)} of {size} processes")
        for other in missing:
            if store.check([f"nin/{other}"]):  # perhaps of a dead process: that one will not confirm
                store.set(f"nin/{store.get(f'nin/{other}').decode()}", token)
        missing = {other for other in missing if not store.check([f"nin/{token}/{other}"])}
        time.sleep(0.01)
    return PrefixStore(token, store)


def _is_lost_process_error(error: RuntimeError) -> bool:
    # gloo has no class for it: its errors begin with the source file and line, in brackets
    return isinstance(error, dist.DistError) or any(
        sign in str(error) for sign in ("gloo/transport", "Connection closed by peer", "Connection reset", "Timed out")
    )


def local_part(order: Tensor, batch_size: int) -> tuple[Tensor, int]:
    """Return this process's part of an order of samples: of every batch each of n processes takes every n-th sample.

    It is `torch.utils.data.DistributedSampler` without padding: no sample is repeated, and each step of the job has the
    samples that it would have in a single process.

    Args:
        order: int64 (M,), the same in all processes.
        batch_size: of all processes together.

    Returns:
        The samples, int64 (K,), and this process's batch size.
    """
    first, step = rank(), world_size()
    if step == 1:
        return order, batch_size
    whole = len(order) // batch_size * batch_size
    full_batches = order[:whole].view(-1, batch_size)[:, first::step].reshape(-1)
    return torch.cat([full_batches, order[whole:][first::step]]), len(range(first, batch_size, step))


def all_reduce_sum(values: Tensor) -> Tensor:
    """Return the sum over all processes, the same bits in each of them."""
    if not is_initialized():
        return values
    total = _on_backend(values.clone())
    dist.all_reduce(total)
    return total.to(values.device)


def _on_backend(values: Tensor) -> Tensor:
    """Return a tensor where the process group can read and write it: NCCL refuses the CPU's, so a copy on the GPU."""
    return values.cuda() if dist.get_backend() == "nccl" else values


def broadcast_result(compute: Callable[[], str]) -> str:
    """Call a function in rank 0 and return its result in all processes, which wait for it.

    Raises:
        UserError: the function raised it; in all processes.
    """
    if not is_initialized():
        return compute()
    message = {}
    if is_main_process():
        try:
            message = {"text": compute()}
        except UserError as error:
            message = {"error": str(error)}
    message = json.loads(all_gather_text(json.dumps(message))[0])
    if "error" in message:
        raise UserError(message["error"])
    return str(message["text"])


@torch.no_grad()
def broadcast_model(model: nn.Module) -> None:
    """Overwrite a model's parameters and buffers with those of rank 0."""
    if is_initialized():
        for value in model.state_dict().values():
            sent = _on_backend(value.detach())
            dist.broadcast(sent, 0)
            value.copy_(sent)  # nothing where it is the same tensor


def all_gather_text(text: str) -> list[str]:
    """Return the texts of all processes, in the order of their ranks."""
    if not is_initialized():
        return [text]
    # bytes in a tensor, and not all_gather_object, which would unpickle what comes over the network
    data = torch.frombuffer(bytearray(text.encode() + b"\0"), dtype=torch.uint8)  # with one more, never empty
    data = _on_backend(data)
    length = torch.tensor([len(data)], device=data.device)
    lengths = [torch.zeros_like(length) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, length)
    padded = F.pad(data, (0, max(map(int, lengths)) - len(data)))
    texts = [torch.zeros_like(padded) for _ in lengths]
    dist.all_gather(texts, padded)
    return [one.cpu().numpy()[: int(size) - 1].tobytes().decode() for one, size in zip(texts, lengths, strict=True)]
