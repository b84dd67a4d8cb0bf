"""The house: imports go down and never in a circle, files are short, public names are documented, examples run."""

import ast
import doctest
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import nin

SOURCE = Path(nin.__file__).parent
ROOT = Path(__file__).parents[1]

# from the ground up; a module imports from lower floors only (docs/design.md)
FLOORS = [
    {"display", "errors", "given", "optim", "recipes", "version"},
    {"value_checks"},
    {"config", "engines", "names", "ops", "runtime"},
    {"data", "epoch_metrics", "layers"},
    {"folders", "fusion", "models"},
    {"checkpoint", "profiling", "timm"},
    {"exporters", "inference"},
    {"server", "training"},
    {"narrowing", "sklearn"},
    {"report"},
    {"speed_search"},
    {"cli", "hub"},
    {"__main__"},
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
FILES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")
MODULES = sorted(
    ".".join(("nin", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")
    for path in FILES
    if path.stem != "__main__"  # importing it runs the shell
)


def top_level(path):
    """Return the module or package directly in nin that a file belongs to."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(path):
    """Yield (line, module directly in nin) for each import of nin's in a file."""
    package = ["nin", *path.relative_to(SOURCE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            home = ".".join(package[: len(package) - node.level + 1] if node.level else [])
            start = ".".join(part for part in (home, node.module) if part)
            names = [f"{start}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            root, _, rest = name.partition(".")
            if root == "nin":
                # `import nin` alone has the public names, up to NiNClassifier
                yield node.lineno, rest.partition(".")[0] or "sklearn"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_down(path):
    home = top_level(path)
    assert home in FLOOR, f"{home} has no floor: give it one in docs/design.md and here"
    for line, target in imported(path):
        assert target in FLOOR, f"{path}:{line} imports nin.{target}, which has no floor"
        assert target == home or FLOOR[target] < FLOOR[home], f"{path}:{line} imports nin.{target} from {home}"


def module_name(path):
    return ".".join(("nin", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")


def imported_modules(path):
    """Return the modules of nin that a file imports, those inside functions too."""
    modules = {module_name(path) for path in FILES}
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        # `from nin.data import load` names a module's function, `from nin.data import loader` a module
        found |= {name if name in modules else name.rpartition(".")[0] for name in names}
    return found & modules - {module_name(path)}


def test_no_circle_of_files():
    after = {module_name(path): imported_modules(path) for path in FILES}
    while leaves := [name for name, targets in after.items() if not targets & after.keys()]:
        for name in leaves:
            del after[name]
    assert not after, f"these import each other, or what does: {', '.join(sorted(after))}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_files_are_short(path):
    # layers.py is read as one page of the field: the layers and their common base
    assert path.name == "layers.py" or len(path.read_text().splitlines()) <= 400


def test_the_picture_in_the_docs_has_these_floors():
    rows = re.findall(r"^\| (\d+) \| (.*?) \|", (ROOT / "docs/design.md").read_text(encoding="utf-8"), re.MULTILINE)
    drawn = {name: int(floor) - 1 for floor, names in rows for name in re.findall(r"`(\w+)/?`", names)}
    assert drawn == {name: floor for name, floor in FLOOR.items() if name != "__main__"}


def test_where_is_names_files_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Where is")[1]
    places = re.findall(r"`([\w/.]+(?:\.\w+|/))`", text)
    assert len(places) > 20
    assert [place for place in places if not (ROOT / "src/nin" / place).exists() and place != "src/nin/"] == []


def test_import_nin_does_not_import_torch():
    code = "import sys, nin; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", nin.__all__)
def test_public_names_resolve_and_are_documented(name):
    value = getattr(nin, name)
    assert inspect.getdoc(value)
    assert name in dir(nin)


def test_unknown_names_are_refused():
    with pytest.raises(AttributeError, match="module 'nin' has no attribute 'conv3x3'"):
        _ = nin.conv3x3


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name):
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    for example in doctest.DocTestFinder(exclude_empty=True).find(module, extraglobs={"nin": nin, "torch": torch}):
        runner.run(example)
    assert runner.summarize(verbose=False).failed == 0


def test_the_main_functions_have_examples():
    for value in (nin.mlpconv, nin.conv1x1, nin.cost, nin.Conv1x1, nin.MLPConv, nin.Bottleneck, nin.Inception):
        assert ">>>" in inspect.getdoc(value)
