"""Launch a Triton kernel: ask the compiler what it takes, then start it without Triton's own look-up.

``kernel[grid](...)`` looks at every argument in each call to find the compiled kernel: 20 µs for 60 arguments. A
`KernelLaunch` has found it once and takes 3 µs.
"""

import contextlib
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

import torch
import triton
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor

from nin.ops.gpu import forward_kernels, tile_sizes
from nin.ops.gpu.autotune import KernelUnavailableError
from nin.ops.gpu.timing_cache import warn_once

# Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1), on the CPU and without a compiler.
INTERPRETED = not isinstance(forward_kernels.layer_forward, triton.JITFunction)
# What Triton raises where a kernel does not compile or does not fit: its own errors, those of LLVM's passes and of an
# unknown architecture (RuntimeError, ValueError), of a missing C compiler or ptxas (OSError).
COMPILE_ERRORS = (
    triton.TritonError,
    RuntimeError,
    ValueError,
    OSError,
    subprocess.CalledProcessError,
)
# Triton 3.9 warns where the choice is left to it, whose default is going to change.
OPTIONS = {"enable_fp_fusion": True}


Recorder = Callable[["KernelLaunch", Sequence[Tensor]], AbstractContextManager[None]]
# What each launch is made in. Of this thread alone, as each records its own calls.
_recorder: ContextVar[Recorder | None] = ContextVar("recorder", default=None)


class KernelLaunch:
    """A kernel with its grid and all arguments but the tensors, compiled.

    Equal tensors in shape, strides, dtype, device and alignment (of their addresses, to 16 bytes) may take the place of
    those that it was made with: the compiled kernel depends on no more.

    Args:
        kernel: the Triton kernel.
        grid: its programs.
        arguments: its arguments; the tensors come first.
        constants: its compile-time arguments and options, by name.

    Raises:
        KernelUnavailableError: it does not compile or does not fit.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], arguments: Sequence[Any], constants: dict[str, Any]) -> None:
        self.kernel, self.name, self.grid = kernel, kernel.__name__, grid
        self.numbers = tuple(argument for argument in arguments if not isinstance(argument, Tensor))
        self.constants = constants
        # Triton's own look-up, in the interpreter and where its compiled kernels have another interface than is known
        self.look_up: Callable[..., Any] = kernel[grid]
        self.start: Callable[..., None] | None = None
        if not INTERPRETED:
            self._compile(arguments)

    def __call__(self, tensors: Sequence[Tensor]) -> None:
        """Launch the kernel on the current stream of the tensors' GPU, which must be the current device."""
        if self.start is None:
            self.look_up(*tensors, *self.numbers, **self.constants)
        else:
            self.start(*[t.data_ptr() for t in tensors], *self.trailing, stream=current_stream(tensors[0]))

    def _compile(self, arguments: Sequence[Any]) -> None:
        """Compile and load the kernel, and find its start."""
        compiled = compile_kernel(self.kernel, self.grid, arguments, self.constants)
        # what follows the tensors: a compiled kernel wants its constants too, though it ignores them
        self.trailing = (*self.numbers, *(self.constants.get(name) for name in self.kernel.arg_names[len(arguments) :]))
        if not hasattr(compiled, "__getitem__"):
            return
        try:
            start = compiled[(*self.grid, 1, 1)[:3]]  # loads it, which fails where it does not fit
        except COMPILE_ERRORS as error:
            raise KernelUnavailableError(f"{self.name}: {first_line(error)}") from error
        if self.kernel not in _starts_alike:
            _starts_alike[self.kernel] = self._starts_alike(compiled, start, arguments)
        if _starts_alike[self.kernel]:
            self.start = start

    def _starts_alike(self, compiled: Any, start: Callable[..., None], arguments: Sequence[Any]) -> bool:
        """Return whether the compiled kernel's start and Triton's own look-up give its launcher the same arguments.

        Nothing is launched.
        """
        tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
        seen: list[tuple[Any, ...]] = []
        launcher = getattr(compiled, "_run", None)
        if not callable(launcher):
            return _say_unknown_launch()
        compiled._run = lambda *given: seen.append(given)
        try:
            start(*[t.data_ptr() for t in tensors], *self.trailing, stream=current_stream(tensors[0]))
            self.look_up(*tensors, *self.numbers, **self.constants)
        except TypeError:  # other parameters than are known
            return _say_unknown_launch()
        finally:
            compiled._run = launcher
        alike = len(seen) == 2 and _plain(seen[0]) == _plain(seen[1])
        return alike or _say_unknown_launch()


# Whether `KernelLaunch` may start a kernel by itself, once it is known.
_starts_alike: dict[Any, bool] = {}


def _plain(given: Sequence[Any]) -> list[Any]:
    """Return a launcher's arguments to compare: addresses of tensors, values, and the kinds of all else (hooks)."""
    values = [value.data_ptr() if isinstance(value, Tensor) else value for value in given]
    return [v if isinstance(v, int | float | str | tuple | None) else type(v) for v in values]


def _say_unknown_launch() -> bool:
    warn_once(f"nin: Triton {triton.__version__} starts kernels in a way of its own: each launch takes 20 µs, not 3")
    return False


def compile_kernel(kernel: Any, grid: tuple[int, ...], arguments: Sequence[Any], constants: dict[str, Any]) -> Any:
    """Return Triton's compiled kernel.

    Raises:
        KernelUnavailableError: it does not compile, or the compiler took more shared memory than the GPU has.
    """
    try:
        # dtypes stand for tensors that have no memory
        known = [a.dtype if isinstance(a, Tensor) and type(a) is FunctionalTensor else a for a in arguments]
        compiled = kernel.warmup(*known, grid=grid, **constants)
        compiled = compiled.result() if hasattr(compiled, "result") else compiled  # of asynchronous compilation
    except COMPILE_ERRORS as error:
        raise KernelUnavailableError(f"{kernel.__name__}: {first_line(error)}") from error
    taken, limit = compiled.metadata.shared, tile_sizes.device_limits(arguments[0]).shared_bytes
    if taken > limit:
        raise KernelUnavailableError(f"{kernel.__name__}: takes {taken:,} bytes of shared memory, of {limit:,}")
    return compiled


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its type's name where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def current_stream(t: Tensor) -> int:
    """Return the handle of the current stream of a tensor's GPU."""
    return triton.runtime.driver.active.get_current_stream(t.get_device())


def launch(kernel: Any, grid: tuple[Any, ...], *arguments: Any, **constants: Any) -> None:
    """Launch a kernel once, in a graph that AOTAutograd traces (torch.compile) as a node of its own.

    Args:
        kernel: the Triton kernel.
        grid: its programs.
        *arguments: its arguments; the tensors come first.
        **constants: its compile-time arguments, warps and stages.

    Raises:
        KernelUnavailableError: it does not compile or does not fit; nothing was launched.
    """
    # wrap_triton always would cost an eager call about 1 ms in the dispatch of a higher-order operator
    if isinstance(arguments[0], FunctionalTensor):
        if torch.cuda.is_available():  # Inductor compiles it much later, where nothing else could take its place
            compile_kernel(kernel, grid, [_example(a) for a in arguments], constants | OPTIONS)
        torch.library.wrap_triton(kernel)[grid](*arguments, **constants)
        return
    made = KernelLaunch(kernel, grid, arguments, constants | OPTIONS)
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    recorder = _recorder.get()
    with recorder(made, tensors) if recorder else contextlib.nullcontext():
        made(tensors)


def _example(argument: Any) -> Any:
    """Return what a traced argument is like: a tensor's dtype, a symbolic size's example."""
    return argument.node.hint if isinstance(argument, torch.SymInt) else argument


@contextlib.contextmanager
def record_launches(recorder: Recorder) -> Iterator[None]:
    """Make each launch of this thread meanwhile in the context that the recorder returns for it and its tensors."""
    token = _recorder.set(recorder)
    try:
        yield
    finally:
        _recorder.reset(token)
