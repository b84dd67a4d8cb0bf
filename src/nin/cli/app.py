"""The command ``nin``: its verbs, and how errors become one line and an exit status."""

from __future__ import annotations

import io
import sys
import warnings
from typing import NoReturn

from cyclopts import App, CycloptsError, Parameter

from nin.distribution import version
from nin.errors import UserError
from nin.runtime import torchrun

app = App(
    name="nin",
    help="Network in Network, real: train on your images, see what the network looks at, count what it costs.",
    version=version,
    version_flags=["--version"],
    result_action="return_value",
    # no --no-json and no --empty-skip; the few options with a --no- form have a Parameter of their own
    default_parameter=Parameter(negative=""),
)

# Each verb is the function of its name in the module of its name, which is imported when the verb runs: `nin --help`
# then needs no PyTorch. For that, the descriptions are here too; the verbs' docstrings begin with the same words.
VERBS = {
    "train": "Train a Network in Network on images, test it, and write a run folder with a report.",
    "check": "Look at every image of a folder: can it be read, is it there twice, is it what it says. Changes nothing.",
    "shards": "Write an image folder as WebDataset shards, for sets of many small files. Goes on where it was stopped.",
    "demo": "Do the main job on images that come along: train, test, look, predict, and time a bottleneck.",
    "predict": "Classify images with a trained network.",
    "cost": "Count parameters, multiply-accumulates (MACs) and activation bytes of a network, layer by layer, and time "
    "them.",
    "bench": "Time the operator and whole networks beside other engines, in turn in one run, against this machine's "
    "limits.",
    "narrow": "Make a trained network narrower, and so faster: fewer channels where they are missed least.\n\n"
    "Stopped with Ctrl-C, the same command goes on.",
    "export": "Write a trained network into a file that runs where nin is not installed, and check it.",
    "report": "Write the report of a run folder again.",
    "serve": "Open the page where you look inside a 1×1 convolution, and inside your own network; with an HTTP API.",
}
for verb, description in VERBS.items():
    app.command(f"nin.cli.{verb}:{verb}", name=verb, help=description)


def main(arguments: list[str] | None = None) -> None:
    """Run one verb and exit: 0 where the work was done, 2 for a wrong argument, 130 after Ctrl-C."""
    # nin's own messages say once what is wrong with an image
    warnings.filterwarnings("ignore", module="PIL")
    # A file's name that is no valid Unicode cannot be encoded: show it with backslashes, as standard error does.
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app(arguments, exit_on_error=False, print_error=False)
    except (CycloptsError, UserError) as error:
        _fail(f"{error}", 2)
    except KeyboardInterrupt:
        _fail("stopped", 130)
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename else f"{error}", 1)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        _fail("out of memory; lower --batch-size, --size or --threads, or take a smaller --model", 1)


def _is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out; PyTorch has a class for it on a GPU, and only a message on the CPU."""
    # by its name, as torch.OutOfMemoryError itself would need PyTorch
    by_class = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return by_class or "can't allocate memory" in str(error) or "not enough memory" in str(error)


def _fail(message: str, status: int) -> NoReturn:
    """Print one line to standard error and exit."""
    rank = torchrun.rank()
    print(f"nin: {f'process {rank}: ' if rank else ''}{' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)
