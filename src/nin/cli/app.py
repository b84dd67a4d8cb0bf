"""The command ``nin``: its verbs, and how errors become one line and an exit status."""

import functools
import io
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

import cyclopts
from cyclopts import App, CycloptsError, Parameter, Token

from nin.cli.bench import bench
from nin.cli.check import check
from nin.cli.console import messages
from nin.cli.cost import cost
from nin.cli.demo import demo
from nin.cli.export import export
from nin.cli.narrow import narrow
from nin.cli.option_errors import explain
from nin.cli.predict import predict
from nin.cli.report import report
from nin.cli.serve import serve
from nin.cli.shards import shards
from nin.cli.speed import speed
from nin.cli.train import train
from nin.errors import UserError, is_out_of_memory
from nin.runtime import torchrun
from nin.version import installed_version

PACKAGE = Path(__file__).parents[1]


def convert(kind: Any, tokens: Sequence[Token]) -> Any:
    """Return the value of an option as Cyclopts converts it, which by itself would round 1.5 to a whole number.

    Raises:
        ValueError: it is empty, as of a variable that is not set ("" would be this folder), or a whole number has a
            fraction.
    """
    for token in tokens:
        if not token.value:
            raise ValueError(f"{token.keyword or 'an argument'} is empty")
    kinds = {kind, *get_args(kind)}  # such as int | Literal["auto"] | None
    if int in kinds and float not in kinds:
        for token in tokens:
            if "." in token.value:
                raise ValueError(f"{token.keyword or token.value} must be a whole number, got {token.value}")
    return cyclopts.convert(kind, tokens)


app = App(
    name="nin",
    help="Network in Network: train on your images, see what the network looks at, count what it costs.",
    version=installed_version,
    version_flags=["--version"],
    result_action="return_value",
    suppress_keyboard_interrupt=False,  # `main` says that it stopped
    # no --no-json and no --empty-skip; the few options with a --no- form have a Parameter of their own
    default_parameter=Parameter(negative="", converter=convert),
)

for verb in (train, check, shards, demo, predict, cost, bench, narrow, speed, export, report, serve):
    app.command(verb)


def main(arguments: list[str] | None = None) -> None:
    """Run one verb and exit.

    The status is 0 where all the work was done; 1 where the machine failed, or a file among others; 2 where an argument
    is wrong; 130 after Ctrl-C.
    """
    with warnings.catch_warnings():
        # nin's own messages say once what is wrong with an image
        warnings.filterwarnings("ignore", module="PIL")
        warnings.showwarning = functools.partial(_show_warning, warnings.showwarning)
        _run(arguments)


def _run(arguments: list[str] | None) -> None:
    """Run one verb; what goes wrong becomes one line and an exit status."""
    # A file's name that is no valid Unicode cannot be encoded: show it with backslashes, as standard error does.
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app(arguments, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        _fail(explain(error), 2)
    except UserError as error:
        _fail(f"{error}", 2)
    except KeyboardInterrupt:
        _fail("stopped", 130)
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename else f"{error}", 1)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        _fail("out of memory; lower --batch-size, --size or --threads, or take a smaller --model", 1)


def _show_warning(
    show: Callable[..., None], message: Warning | str, category: type[Warning], filename: str, *where: Any
) -> None:
    """Print a warning of nin's own as a line for people, without a line of its code; others as ``show`` does."""
    if Path(filename).is_relative_to(PACKAGE):
        messages.print(f"note: {message}")
    else:
        show(message, category, filename, *where)


def _fail(message: str, status: int) -> NoReturn:
    """Print one line to standard error and exit."""
    rank = torchrun.rank()
    print(f"nin: {f'process {rank}: ' if rank else ''}{' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)
