# make demo: a fresh machine to a trained, tested and explained network. make test: every check of the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# what nin itself needs is installed; what its tests need, too
INSTALLED := $(VENV)/.installed
READY := $(VENV)/.ready
OLDEST := .venv-oldest

.PHONY: demo test test-isa test-arm test-slow test-oldest wheel smoke docs lint clean help

help:
	@echo "make demo         install into .venv, train and test on embedded images, write runs/demo (about 2 minutes)"
	@echo "make test         install into .venv, run the tests"
	@echo "make test-isa     the kernels' tests with each instruction set as if it were the machine's own"
	@echo "make test-arm     the kernels on an emulated ARM processor; needs g++-aarch64-linux-gnu and qemu-user"
	@echo "make test-slow    the long tests"
	@echo "make test-oldest  the tests with the oldest versions that pyproject.toml allows, in .venv-oldest"
	@echo "make wheel        build dist/: a manylinux wheel for all Python versions, and the source distribution"
	@echo "make smoke        the wheel in an empty environment of each Python that is found"
	@echo "make docs         build the documentation site into build/site"
	@echo "make lint         ruff and mypy"
	@echo "make clean        remove .venv, .venv-oldest and build"

# The program is told what was typed, for the line that says how to go on.
demo: $(INSTALLED)
	@NIN_TYPED='make demo' $(BIN)/nin demo

# One process for each core; more than eight would need more memory than most machines have.
test: $(READY)
	$(BIN)/python -m pytest -q --numprocesses auto --maxprocesses 8

test-isa: $(READY)
	$(BIN)/python tests/support/each_isa.py

# Guard pages and plain loops. Without AddressSanitizer, with which it did not end in five minutes under QEMU.
test-arm:
	cmake -S . -B build/arm -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	    -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DNIN_NATIVE_TESTS=ON -DNIN_SANITIZERS=
	cmake --build build/arm --target guard_test nin_cpu --parallel 2
	qemu-aarch64 -L /usr/aarch64-linux-gnu build/arm/guard_test

test-slow: $(READY)
	$(BIN)/python -m pytest -q -m slow

# What pyproject.toml promises: PyTorch and every other direct dependency at its lower bound.
test-oldest: $(OLDEST)/.ready
	$(OLDEST)/bin/python -m pytest -q --numprocesses auto --maxprocesses 8 $(OPTIONS)

$(OLDEST)/.ready: $(READY)
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(BIN)/python -m uv pip install --python $(OLDEST)/bin/python --resolution lowest-direct --editable '.[dev]'
	@touch $@

# Through the source distribution, so that both are known to be whole. The library in the wheel has a plain C
# interface: one wheel serves every Python version, and auditwheel names the oldest glibc that it runs with.
wheel: $(READY)
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist dist/*-linux_*.whl
	rm dist/*-linux_*.whl

smoke: wheel
	$(BIN)/python packaging/smoke.py

docs: $(READY)
	$(BIN)/python docs/build_site.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Editable, so that a change of a Python file counts at once; built again when the compiled part changes.
# uv installs PyTorch's packages in seconds where pip takes minutes.
$(INSTALLED): pyproject.toml CMakeLists.txt $(wildcard src/nin/ops/cpu/csrc/*)
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else f"nin needs Python 3.11 or newer, this is {v[0]}.{v[1]}: make PYTHON=python3.12 demo")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV). PyTorch for Linux is a download of about 2.5 GB: seconds to minutes, once."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@# the distribution was called nin once; left in an environment, it would hide this one
	@$(BIN)/python -m uv pip uninstall --quiet --python $(BIN)/python nin 2>/dev/null || true
	$(BIN)/python -m uv pip install --python $(BIN)/python --editable .
	@touch $@

$(READY): $(INSTALLED)
	$(BIN)/python -m uv pip install --python $(BIN)/python --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) $(OLDEST) build
