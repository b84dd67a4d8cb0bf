"""Dataclasses that know which of their fields were given: one may be given as its default."""

import dataclasses
import functools
from typing import Any, TypeVar

Class = TypeVar("Class", bound=type[Any])
Instance = TypeVar("Instance", bound=Any)


def remembers_given(cls: Class) -> Class:
    """Let the objects of a dataclass have an attribute ``given``, the names of the fields that were given.

    `dataclasses.replace` gives all fields: of these count those that do not have their default. `replace` knows better.
    """
    init, fields = cls.__init__, dataclasses.fields(cls)

    @functools.wraps(init)
    def remember(self: Any, *values: Any, **named: Any) -> None:
        init(self, *values, **named)
        given = {field.name for field, _ in zip(fields, values, strict=False)} | named.keys()
        if len(given) == len(fields):
            given = {field.name for field in fields if getattr(self, field.name) != field.default}
        object.__setattr__(self, "given", frozenset(given))

    cls.__init__ = remember
    return cls


def replace(instance: Instance, **changes: Any) -> Instance:
    """Return an object with some fields changed, in which the same ones were given."""
    changed: Any = dataclasses.replace(instance, **changes)
    object.__setattr__(changed, "given", instance.given)
    return changed
