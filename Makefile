# One command each: make demo | demo-real | test | test-fast | lint | bench | setup
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
JSON   ?= runs/bench
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
BESIDE := -n $(WORKERS) --dist loadgroup --no-loadscope-reorder

.PHONY: setup demo demo-real test test-fast lint bench clean

setup: $(VENV)/.ready

# torch first and alone: where a CPU or CUDA build has been chosen already, the pinned version keeps it.
$(VENV)/.ready: pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python >= 3.11 is needed: make setup PYTHON=python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup
	$(BIN)/python -m megaopus demo --out runs/demo

# Under 40 minutes on two cores, by estimate: the same with a real pre-trained model, which is downloaded (8 GB of memory, 6 of disk).
demo-real: setup
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[real]'
	$(BIN)/python -m megaopus demo --real --out runs/demo_real

test: setup
	$(PYTEST) $(BESIDE)

# Two minutes: a small run from text to report, and what is quick.
test-fast: setup
	$(PYTEST) $(BESIDE) -m 'not ranks and not slow' tests/test_*.py tests/unit tests/configs

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	mkdir -p $(JSON)
	for name in estimators throughput scoring quality optimizers data filters checkpoint faults; do \
		$(BIN)/python benchmarks/$$name.py --quick --json $(JSON)/$$name.json || exit 1; \
	done

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
