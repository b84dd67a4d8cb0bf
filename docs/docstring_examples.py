"""An extension of griffe, which reads the docstrings for the site: a section "Example" is code to be shown as code."""

import re
from typing import Any

import griffe


class ExampleSections(griffe.Extension):
    """Calls the section by the name that griffe knows."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
