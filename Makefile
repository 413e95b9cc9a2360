# deltaw: every command that people and CI run. `make` lists them.
# `make demo` and `make test` set everything up by themselves on a machine with Python >= 3.11 and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo check test test-long torture docs bench gpu-check clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(READY)  ## make .venv with pinned versions and the command deltaw in it

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "deltaw needs Python 3.11 or newer; try: make PYTHON=python3.11 setup")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(READY)

demo: $(READY)  ## adapt SmolLM2-135M to real reviews and see what changed (four to sixteen minutes on two cores)
	$(BIN)/deltaw demo $(DEMO)

check: $(READY)  ## formatter, linter, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --durations=0 -k "imports_point_down or stands_in_a_layer" tests/test_house.py

test: $(READY)  ## the tests
	$(BIN)/python -m pytest -m 'not long'

test-long: $(READY)  ## the tests, and the proofs that take longer
	$(BIN)/python -m pytest

torture: $(READY)  ## thousands of kills, failing disks, flipped bits and NaNs (about twenty minutes)
	$(BIN)/python benchmarks/torture.py

docs: $(READY)  ## write the reference pages from the code
	$(BIN)/python dev/reference.py docs/reference

# Those that keep rows measure what has none: take a row out of benchmarks/results to measure it anew.
bench: $(READY)  ## the benchmarks whose numbers the docs quote (long)
	$(BIN)/python benchmarks/demo_accuracy.py
	$(BIN)/python benchmarks/data_speed.py
	$(BIN)/python benchmarks/incumbent.py --runs 40
	$(BIN)/python benchmarks/checkpoint_cost.py
	$(BIN)/python benchmarks/start_up.py
	$(BIN)/python benchmarks/gradient_error.py
	$(BIN)/python benchmarks/memory_growth.py
	$(BIN)/python benchmarks/versus.py --sweep
	$(BIN)/python benchmarks/versus.py
	$(BIN)/python benchmarks/passes.py
	$(BIN)/python benchmarks/stored_layers.py
	$(BIN)/python benchmarks/plan_accuracy.py
	$(BIN)/python benchmarks/big_base.py
	$(BIN)/python benchmarks/combine_error.py
	$(BIN)/python benchmarks/rank_calibration.py
	$(BIN)/python benchmarks/rank_calibration.py tasks plots
	$(BIN)/python benchmarks/nested.py

gpu-check:  ## compare with the processor and time training, where there is a GPU (PYTHON=… picks the environment)
	$(PYTHON) benchmarks/gpu_check.py

clean:  ## remove the environment and build leftovers (runs and caches stay)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
