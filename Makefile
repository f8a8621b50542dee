# Everything in an environment of its own, .venv. Needs Python 3.11+ with its venv module, and a C++ compiler.

PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
BUILD_INPUTS := setup.py pyproject.toml constraints.txt MANIFEST.in $(shell find csrc -type f)

.PHONY: venv demo test docs gpu-check sanitize clean

venv: .venv/installed

demo: venv
	$(BIN)/ffw-fast run multi-color-mnist --schedule adaptive --gamma 1 --out runs/demo

test: venv
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m 'not (ladder and slow)'

# The reference of all public names, from their docstrings: build/reference/index.html.
docs: venv
	$(BIN)/pip install --quiet --no-build-isolation -e '.[docs]'
	$(BIN)/pdoc --docformat google --output-directory build/reference ffw_fast ffw_fast.theory \
		ffw_fast.figures ffw_fast.report ffw_fast.runs.reading ffw_fast.attribution

# The C++ operators' tests under AddressSanitizer and UBSan, then under ThreadSanitizer; needs GCC's libraries of them.
sanitize: venv
	$(BIN)/python -m tests.sanitizers address
	$(BIN)/python -m tests.sanitizers thread

# All proofs of the GPU kernels that need no GPU; needs nvcc for some, and takes long.
gpu-check: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m ladder
	$(BIN)/python -m ffw_fast.benchmarks.ladder

clean:
	rm -rf .venv build dist *.egg-info ffw_fast/*.so
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks

$(BIN)/python:
	$(PYTHON) -m venv .venv

# The stamp is newer than all that the compiled kernels and the dependencies are made from.
.venv/installed: $(BIN)/python $(BUILD_INPUTS)
	$(BIN)/python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' \
		|| $(BIN)/pip install '$(TORCH)'
	$(BIN)/pip install 'setuptools>=77'
	$(BIN)/pip install --constraint constraints.txt --no-build-isolation -e '.[test,digits]' \
		|| $(BIN)/pip install --no-build-isolation -e '.[test,digits]'  # an index or a Python without those versions
	touch $@
