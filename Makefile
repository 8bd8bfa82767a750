# Two commands on a fresh machine: `make demo` and `make test`. Everything stands in $(VENV).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SOURCES := setup.py pyproject.toml CMakeLists.txt $(wildcard csrc/*)

.PHONY: help demo test lint format bench wheel clean
help:
	@echo "make demo    pre-train a small LLaMA with AdamW, APOLLO and APOLLO-Mini; a table and a PNG"
	@echo "make test    the whole suite        make lint   ruff, clang-format, mypy"
	@echo "make bench   time a step, next to the peers that are installed"
	@echo "make wheel   dist/*.whl and sdist   make clean  remove what was built"
	@echo "PYTHON=python3.12 and VENV=path choose the interpreter and the virtual environment."

# The package in editable mode, built with ordinary build isolation; again when its sources change.
$(READY): requirements-dev.txt $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -e .
	$(BIN)/python -m apollo_kernels info
	touch $@

demo: $(READY)
	$(BIN)/python examples/pretrain.py --demo

# pytest, not python -m pytest: the root on sys.path would let the folder triton/ pose as Triton.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror csrc/*
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*

bench: $(READY)
	$(BIN)/python bench/bench_step.py --quick

wheel: $(READY)
	$(BIN)/python -m build

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache runs $(VENV)
	rm -f apollo_kernels/_C*.so apollo_kernels/_no_native.txt
