"""Bundle the page's JavaScript modules into one script: browsers load no modules from a disk."""

import re
from collections.abc import Callable, Mapping

IMPORT = re.compile(
    r'^import (?:\{(?P<names>[^}]*)\}|\* as (?P<whole>\w+)) from "\./(?P<module>[\w.-]+)";\n', re.MULTILINE
)
_EXPORT = re.compile(r"^export (?=(?:async function|function|class|const) (\w+))", re.MULTILINE)
_LEFT = re.compile(r"^(import|export)\b.*", re.MULTILINE)


def bundle(start: str, read: Callable[[str], str], replacements: Mapping[str, str]) -> str:
    """Return a script of a module and all that it imports.

    Each module becomes a function that is called once, after those that it imports. It reads the modules of this
    page: named and whole imports from the same folder, and exported functions, classes and constants.

    Args:
        start: the module's name.
        read: gives a module's text by its name.
        replacements: modules that take the place of others, by their names.

    Raises:
        ValueError: a module imports or exports in another way, or modules import each other in a circle.
    """
    written: list[str] = []
    done: set[str] = set()

    def add(name: str, above: tuple[str, ...]) -> None:
        if name in above:
            raise ValueError(f"modules import each other: {' → '.join((*above, name))}")
        if name in done:
            return
        text = read(name)
        for found in IMPORT.finditer(text):
            add(replacements.get(found["module"], found["module"]), (*above, name))
        done.add(name)
        written.append(_module(name, text, replacements))

    add(start, ())
    return '"use strict";\n(() => {\n' + "\n".join(written) + "})();\n"


def _module(name: str, text: str, replacements: Mapping[str, str]) -> str:
    """Return a module as a call whose result are its exports."""

    def bind(found: re.Match[str]) -> str:
        source = _identifier(replacements.get(found["module"], found["module"]))
        if found["whole"]:
            return f"const {found['whole']} = {source};\n"
        return f"const {{{found['names'].replace(' as ', ': ')}}} = {source};\n"

    body = _EXPORT.sub("", IMPORT.sub(bind, text))
    if left := _LEFT.search(body):
        raise ValueError(f"{name}: this cannot be bundled: {left[0]}")
    return f"// {name}\nconst {_identifier(name)} = (() => {{\n{body}return {{ {', '.join(exports(text))} }};\n}})();\n"


def exports(text: str) -> list[str]:
    """Return the names that a module exports."""
    return _EXPORT.findall(text)


def _identifier(name: str) -> str:
    return "module_" + re.sub(r"\W", "_", name)
