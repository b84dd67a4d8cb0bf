"""What every test starts from: the same random numbers, and one thread, as the tensors are small.

And what the tests of the CPU kernels share.
"""

import os
import shutil
import struct

import pytest
import torch
from filelock import FileLock

from nin.version import installed_version
from support.browser import CHROMIUM
from support.native import INSTRUCTION_SETS, build_native

torch.set_num_threads(1)

# Without a GPU, Triton's kernels run in its interpreter; it looks at this when a kernel's module is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config):
    """Register the mark of tests that run with each instruction set; make test-isa leaves them out."""
    config.addinivalue_line("markers", "each_isa: runs with each instruction set, whatever the machine's own")


@pytest.hookimpl(tryfirst=True)  # before tests are deselected by their marks
def pytest_collection_modifyitems(items):
    """Mark the tests that take the fixture `isa`."""
    for item in items:
        if "isa" in item.fixturenames:
            item.add_marker("each_isa")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def made_once(tmp_path_factory, name, make):
    """Return a folder that the first of pytest-xdist's processes to ask for it makes, for all of them."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(f"{folder}.lock"):
        if not (folder / "made").exists():
            folder.mkdir(exist_ok=True)
            make(folder)
            (folder / "made").touch()
    return folder


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory):
    """A run folder of the digits, made by the program's own verb; nobody may change it, see `run`."""

    def train(folder):
        from nin.cli import app

        app.main(["train", "digits", "--out", str(folder / "run"), "--epochs", "4", "--batch-size", "128"])

    return made_once(tmp_path_factory, "trained", train) / "run"


@pytest.fixture(scope="module")
def run(trained_run, tmp_path_factory):
    """A copy of `trained_run` for the tests of one module, which may write into it."""
    return shutil.copytree(trained_run, tmp_path_factory.mktemp("copy") / "run")


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    """Build the library with AMX's tile registers computed in plain C++."""
    from nin.ops.cpu import library

    options = ("-DNIN_EMULATE_AMX=ON", f"-DSKBUILD_PROJECT_VERSION={installed_version()}")
    folder = made_once(tmp_path_factory, "emulated", lambda folder: build_native(folder, "nin_cpu", *options))
    return library.load_library(folder / library.LIBRARY_NAME)


@pytest.fixture(scope="session", autouse=True)
def _own_instruction_set(request):
    """Emulate AMX's registers for the whole session where NIN_CPU_ISA asks for AMX and the machine lacks it."""
    if os.environ.get("NIN_CPU_ISA") != "avx512_amx":
        yield
        return
    from nin.ops.cpu import dispatch, library

    if dispatch.KERNELS.name == "avx512_amx":
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "LIBRARY", request.getfixturevalue("emulated"))
        kernels = library.find_kernels(library.LIBRARY, "avx512_amx")
        assert kernels.name == "avx512_amx", "the machine lacks AVX-512 with bf16, which AMX's kernels use"
        patch.setattr(dispatch, "KERNELS", kernels)
        yield


@pytest.fixture(params=INSTRUCTION_SETS)
def isa(request, monkeypatch):
    """Run the test with each instruction set that this machine has, AMX's registers emulated where it lacks them."""
    from nin.ops.cpu import dispatch, library

    kernels = library.find_kernels(library.LIBRARY, request.param)
    if kernels.name == "avx512_bf16" and request.param == "avx512_amx":
        monkeypatch.setattr(library, "LIBRARY", request.getfixturevalue("emulated"))
        kernels = library.find_kernels(library.LIBRARY, request.param)
        assert kernels.name == request.param, "its product of whole numbers came out wrong"
    if kernels.name != request.param:
        pytest.skip(f"this machine lacks {request.param}")
    monkeypatch.setattr(dispatch, "KERNELS", kernels)
    return request.param


@pytest.fixture
def force(monkeypatch):
    """Return a function that forces one Winograd tile size on every k×k layer; 0: direct convolution."""
    from nin.ops.cpu import abi, conv_backward, dispatch

    sizes = []

    def choose(kernels, packed_chain, chain):
        size = sizes[-1] if chain.weights[0].shape[2] > 1 else 0
        return packed_chain[:-8] + struct.pack("q", size), size

    monkeypatch.setattr(abi, "choose_winograd", choose)
    monkeypatch.setattr(dispatch, "is_faster_in_pytorch", lambda *_: False)
    monkeypatch.setattr(conv_backward, "MIN_WINOGRAD_PIXELS", 0)
    return sizes.append


@pytest.fixture(params=[1, 2, 4])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def browser():
    """Start Chromium; Playwright keeps an event loop in this thread, so it ends with the module."""
    from playwright.sync_api import sync_playwright

    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()
