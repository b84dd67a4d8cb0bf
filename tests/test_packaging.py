"""What is shipped: one wheel for every Python, with the compiled library and the page in it, and a whole sdist."""

import importlib
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from nin.version import DISTRIBUTION, installed_version

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Return the wheel and the source distribution, the one made from the other."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--outdir", folder, ROOT], check=True, capture_output=True)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


@pytest.mark.slow
def test_the_wheel_is_for_every_python_and_holds_what_is_needed(built):
    wheel, _ = built
    assert "-py3-none-linux_" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {
        "nin/py.typed",
        "nin/ops/cpu/libnin_cpu.so",
        "nin/report/run_report.html",
        "nin/server/page/index.html",
    } <= names
    assert not any("csrc" in name or name.startswith("tests/") for name in names)


@pytest.mark.slow
def test_the_library_runs_with_an_old_glibc(built):
    command = [sys.executable, "-m", "auditwheel", "show", built[0]]
    report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    version = report.split('"manylinux_2_')[1].partition("_")[0]
    assert int(version) <= 28, report  # PyTorch's own wheels are manylinux_2_28


@pytest.mark.slow
def test_the_sdist_holds_the_sources_and_the_licence(built):
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "CMakeLists.txt", "src/nin/ops/cpu/csrc/kernels.inc", "src/nin/__init__.py"} <= names
    assert not any(name.startswith((".venv", "build", "dist", "runs")) for name in names)


def test_nothing_tells_people_to_install_somebody_elses_package():
    """``nin`` on PyPI is another project: commands and extras name network-in-network."""
    wrong = re.compile(r"pip install ['\"]?nin\b(?!` installs something else)|\bnin\[[a-z]+\]")
    files = [ROOT / "README.md", ROOT / "pyproject.toml", *ROOT.glob("docs/**/*.md"), *ROOT.glob("src/**/*.py")]
    found = {path: wrong.findall(path.read_text(encoding="utf-8")) for path in files}
    assert {path: lines for path, lines in found.items() if lines} == {}


def test_every_extra_is_in_the_table_of_the_installation():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    table = (ROOT / "docs/install.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `network-in-network\[(\w+)\]` \|", table, re.MULTILINE)
    assert sorted(rows) == sorted(extras)


def test_the_version_is_that_of_the_distribution():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (project["name"], project["version"]) == (DISTRIBUTION, installed_version())


@pytest.mark.parametrize(("module", "package", "extra"), [("hub", "huggingface_hub", "hub"), ("timm", "timm", "timm")])
def test_a_module_without_its_extra_says_what_to_install(module, package, extra, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == package or name == f"nin.{module}"]:
        monkeypatch.delitem(sys.modules, name)

    class Missing:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == package:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(sys, "meta_path", [Missing, *sys.meta_path])
    with pytest.raises(ModuleNotFoundError) as refused:
        importlib.import_module(f"nin.{module}")
    assert str(refused.value) == f"nin.{module} needs {package}: pip install 'network-in-network[{extra}]'"
