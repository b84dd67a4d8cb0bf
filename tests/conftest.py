"""What every test starts from: the same random numbers, and one thread, as the tensors are small.

And what the tests of the CPU kernels share.
"""

import os

import pytest
import torch

from nin import distribution
from support.browser import CHROMIUM
from support.native import INSTRUCTION_SETS, build_native

torch.set_num_threads(1)

# Without a GPU, Triton's kernels run in its interpreter; it looks at this when a kernel's module is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    """Build the library with AMX's tile registers computed in plain C++."""
    from nin.ops.cpu import library as compiled

    folder = tmp_path_factory.mktemp("emulated")
    build_native(folder, "nin_cpu", "-DNIN_EMULATE_AMX=ON", f"-DSKBUILD_PROJECT_VERSION={distribution.version()}")
    return compiled.load_library(folder / compiled.LIBRARY_NAME)


@pytest.fixture(params=INSTRUCTION_SETS)
def isa(request, monkeypatch):
    """Run the test with each instruction set that this machine has, AMX's registers emulated where it lacks them."""
    from nin.ops.cpu import dispatch
    from nin.ops.cpu import library as compiled

    kernels = compiled.find_kernels(compiled.LIBRARY, request.param)
    if kernels.name == "avx512_bf16" and request.param == "avx512_amx":
        library = request.getfixturevalue("emulated")
        monkeypatch.setattr(compiled, "LIBRARY", library)
        kernels = compiled.find_kernels(library, request.param)
        assert kernels.name == request.param, "its product of whole numbers came out wrong"
    if kernels.name != request.param:
        pytest.skip(f"this machine lacks {request.param}")
    monkeypatch.setattr(dispatch, "KERNELS", kernels)
    return request.param


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
