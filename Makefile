# Two commands on a fresh machine: `make demo` and `make test`. Everything stands in $(VENV).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Developers test what nvcc makes, wherever it is; users' default is in setup.py.
export APOLLO_KERNELS_CUDA ?= nvcc
SOURCES := setup.py pyproject.toml CMakeLists.txt $(wildcard csrc/*)

.PHONY: help ready demo docs test test-ptx test-sanitizers test-mutants lint format bench kernel-report gpu-check wheel clean
help:
	@echo "make demo    pre-train a small LLaMA with AdamW, APOLLO, Mini and int8 Mini; a table and a PNG"
	@echo "make test    the whole suite        make lint   ruff, clang-format, mypy"
	@echo "make bench   roofline, the verbs, and a step next to the peers that are installed"
	@echo "make test-ptx       what nvcc and Triton compile, run by an interpreter: an hour"
	@echo "make gpu-check      with a GPU: build, test, sanitize, measure; writes bench/results/"
	@echo "make kernel-report  registers, spills and instructions of every compiled kernel"
	@echo "make docs    the pages of docs/ as HTML in build/docs/; warnings are errors"
	@echo "make wheel   dist/*.whl and sdist   make clean  remove what was built"
	@echo "PYTHON=python3.12 and VENV=path choose the interpreter and the virtual environment."

# The package in editable mode, built with ordinary build isolation; again when its sources change.
$(READY): requirements-dev.txt $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -e .
	$(BIN)/python -m apollo_kernels info
	touch $@

ready: $(READY)

demo: $(READY)
	$(BIN)/python examples/pretrain.py --demo

# pytest, not python -m pytest: the root on sys.path would let the folder triton/ pose as Triton.
# worksteal: each worker goes through files of its own, so that what takes a minute to build is built
# by one while the other tests, and both end together.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

# An hour, where nvcc is: what it compiles, and what Triton does, run by an interpreter of PTX.
# A line for each case. EVERY=10 takes a tenth of the grid, PTX="-k 'rank and 130'" what it names.
test-ptx: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -v tests/ptx/grid.py $(PTX)
	TRITON_INTERPRET=0 OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -v tests/ptx/triton_checks.py $(PTX)
	$(BIN)/python tests/ptx/mutants.py

# Minutes: every kernel on the emulated device under sanitizers, and seeded bugs that they must catch.
test-sanitizers: $(READY)
	$(BIN)/python tests/sanitizers.py

# Minutes, before a release: single changes to the kernels, each of which a test must notice.
# MUTANTS="clip found_inf" runs those with one of the words in their name.
test-mutants: $(READY)
	$(BIN)/python tests/mutants.py $(MUTANTS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror csrc/* bench/*.cu tests/cuda_on_cpu/*
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/* bench/*.cu tests/cuda_on_cpu/*

# BENCH=  for the full runs; PYTHONPATH=<folder> brings peers that are installed elsewhere.
BENCH ?= --quick
OUT ?= build/bench
bench: $(READY)
	$(BIN)/python bench/roofline.py --out $(OUT)
	$(BIN)/python bench/bench_ops.py $(BENCH) --out $(OUT)
	$(BIN)/python bench/bench_step.py $(BENCH) --out $(OUT)

kernel-report: $(READY)
	$(BIN)/python bench/kernel_report.py --predict --out bench/results
	$(BIN)/python bench/triton_aot.py --few --out bench/results

# Uses what is installed (torch, nvcc, cmake, ninja, pybind11, pytest, matplotlib) and no network.
# gpu-build, gpu-environment, gpu-test, ... run one part; bench/gpu_check.py lists them.
GPU_PYTHON ?= $(if $(wildcard $(READY)),$(BIN)/python,$(PYTHON))
gpu-check:
	$(GPU_PYTHON) bench/gpu_check.py
gpu-%:
	$(GPU_PYTHON) bench/gpu_check.py $*

# In an environment of its own, without torch: the API pages are read from the sources.
DOCS_VENV ?= .venv-docs
docs: $(DOCS_VENV)/.ready
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/python -m mkdocs --quiet build --strict
	@echo "build/docs/index.html"
$(DOCS_VENV)/.ready: requirements-docs.txt
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	touch $@

wheel: $(READY)
	$(BIN)/python -m build

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache runs $(VENV) $(DOCS_VENV)
	rm -f apollo_kernels/_C*.so apollo_kernels/_no_native.txt apollo_kernels/_cuda_why.txt
