"""What a search has found so far, in a file, so that it goes on after an interruption with nothing measured twice."""

import json
from pathlib import Path
from typing import Any

from nin.errors import UserError
from nin.runtime.files import write_atomically

STATE_FILE = "state.json"


class SearchState:
    """Facts by name, each written as soon as it is known.

    Args:
        folder: that holds the file, and everything that is built.
        fingerprint: of the network, the images and the settings.

    Raises:
        UserError: the folder holds the state of another search.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder, self.path = folder, folder / STATE_FILE
        self.facts: dict[str, Any] = {}
        if self.path.is_file():
            try:
                values = json.loads(self.path.read_text(encoding="utf-8"))
                self.facts, before = dict(values["facts"]), values["fingerprint"]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{self.path} is damaged ({error}): give another --out, or --overwrite") from error
            if before != fingerprint:
                raise UserError(
                    f"{folder.parent} was begun with another network, other images or other settings: give the same, "
                    "or another --out, or --overwrite"
                )
        self.fingerprint = fingerprint

    def get(self, name: str) -> Any:
        """Return a fact, or None where it is not known yet."""
        return self.facts.get(name)

    def set(self, name: str, value: Any) -> None:
        """Keep a fact."""
        self.facts[name] = value
        write_atomically(self.path, json.dumps({"fingerprint": self.fingerprint, "facts": self.facts}))
