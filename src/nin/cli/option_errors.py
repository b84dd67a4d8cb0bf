"""Mistakes in the arguments of a command, in plain words."""

import difflib
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from cyclopts import (
    CoercionError,
    CycloptsError,
    MissingArgumentError,
    UnknownCommandError,
    UnknownOptionError,
    UnusedCliTokensError,
)

# what other programs call our options, where the letters are too different for a suggestion
OTHER_NAMES = {
    "--lr": "--learning-rate",
    "--wd": "--weight-decay",
    "--bs": "--batch-size",
    "--batch": "--batch-size",
    "--workers": "--threads",
    "--output": "--out",
    "--img-size": "--size",
    "--imgsz": "--size",
    "--gpu": "--device",
    "--arch": "--model",
}

# what people look for under another name
OTHER_VERBS = {
    "fuse": "fusing is nin.fuse(model, x) in Python (docs/fuse.md); nin speed measures it beside other ways",
    "test": "nin report RUN says how good a run is, nin predict RUN IMAGES answers for new images",
    "classify": "nin predict RUN IMAGES",
    "convert": "nin export RUN",
    "prune": "nin narrow RUN --data IMAGES",
}
OTHER_VERBS |= {"evaluate": OTHER_VERBS["test"], "eval": OTHER_VERBS["test"], "benchmark": "nin bench or nin speed"}

_KINDS = {int: "a whole number", float: "a number", bool: "yes or no", Path: "a path", str: "a text"}


def explain(error: CycloptsError) -> str:
    """Return what is wrong with the arguments, what was expected, and what was probably meant."""
    verb = " ".join(("nin", *(error.command_chain or ())))
    match error:
        case UnknownCommandError(unused_tokens=[name, *_]) if name in OTHER_VERBS:
            return f"there is no verb {name}: {OTHER_VERBS[name]}"
        case UnknownOptionError():
            keyword = (error.token.keyword or "").partition("=")[0]
            known = {name for argument in error.argument_collection for name in argument.names}
            usual = OTHER_NAMES.get(keyword)
            return f"Unknown option: {keyword}. Did you mean {usual}?" if usual in known else f"{error}"
        case CoercionError(token=token) if token is not None and error.msg is not None:
            return str(error.msg)  # of our own converter
        case CoercionError(token=token, target_type=kind) if token is not None and kind is not None:
            name = token.keyword or (error.argument.name if error.argument else "an argument")
            near = difflib.get_close_matches(token.value.lower(), choices(kind), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            got = f", got {token.value!r}" if token.value else ""  # the oldest Cyclopts loses that of a flag
            return f"{name} must be {describe(kind)}{got}{hint}"
        case UnusedCliTokensError(unused_tokens=tokens) if tokens:
            return f"{tokens[0]!r} is one argument too many; {verb} --help lists what there is"
        case MissingArgumentError(argument=argument) if argument is not None and not argument.tokens:
            if argument.required:
                return f"{verb} needs {argument.name}; {verb} --help says what it is"
            return f"{argument.name} is given without its value; {verb} --help says what it is"
        case _:
            return str(error)


def choices(kind: Any) -> list[str]:
    """Return the words that an option of a type takes."""
    if get_origin(kind) is Literal:
        return [str(value) for value in get_args(kind)]
    return [word for part in get_args(kind) for word in choices(part)]


def describe(kind: Any) -> str:
    """Return what an option of a type takes.

    Example:
        >>> describe(float | Literal["auto"] | None)
        'a number or auto'
    """
    if get_origin(kind) is Literal:
        *first, last = map(str, get_args(kind))
        return f"{', '.join(first)} or {last}" if first else last
    parts = [part for part in get_args(kind) if part not in (NoneType, Ellipsis)]
    return (
        " or ".join(dict.fromkeys(map(describe, parts)))
        if parts
        else _KINDS.get(kind, getattr(kind, "__name__", str(kind)))
    )
