# `make demo`, `make test` and `make test-all` do everything on a fresh machine.
# They first run tools/setup.sh, which makes .venv and installs what is missing.

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Processes that test, half as many again as processors: tests of kills and limits mostly wait.
TESTERS ?= $(shell echo $$(( ($$(nproc) * 3 + 1) / 2 )))

MINUTES ?= 10
SECONDS ?= 60

.PHONY: help demo test test-all test-failed test-slow lint format mutate soak fuzz bench bench-quick clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    the main job on real input: commit and flatten an ext4 disk, run a guest"
	@echo "make test    at least one test of each promise of the README, under 5 minutes"
	@echo "make test-all     all tests, with the long walks: every fault at every step"
	@echo "make test-failed  the tests that failed in the last run, once more and alone"
	@echo "make test-slow    tests that take minutes each: 300 power cuts, the bench in full"
	@echo "make lint    ruff, mypy --strict, import contract, retired words"
	@echo "make mutate  faults made on purpose, each of which its tests must catch"
	@echo "make soak    MINUTES=10: random kills, faults and power cuts on random chains"
	@echo "make fuzz    SECONDS=60: damaged headers, bitmaps and chains through every reader"
	@echo "make bench   both sides of every comparison, full size; make bench-quick under a minute"
	@echo "make format  let ruff rewrite the sources"
	@echo "make clean   remove the virtual environment and caches"

$(READY): pyproject.toml tools/setup.sh tools/guest_kernel.sh
	@tools/setup.sh $(VENV)
	@touch $@

demo: $(READY)
	@$(BIN)/python tools/demo.py

PYTEST := $(BIN)/python -m pytest

test: $(READY)
	@$(PYTEST) -n $(TESTERS) --dist loadfile

test-all: $(READY)
	@$(PYTEST) -n $(TESTERS) --dist loadfile -m "not slow"

# One after the other: under the load of other tests a test may miss a limit of time.
test-failed: $(READY)
	@$(PYTEST) -m "not slow" --last-failed --last-failed-no-failures none

test-slow: $(READY)
	@$(PYTEST) -m slow

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python tools/errors_table.py --check
	@$(BIN)/python tools/api_reference.py --check
	@$(BIN)/python tools/words.py

mutate: $(READY)
	@$(BIN)/python tools/mutate.py

soak: $(READY)
	@$(BIN)/python tools/soak.py --minutes $(MINUTES)

fuzz: $(READY)
	@$(BIN)/python tools/fuzz.py --seconds $(SECONDS)

bench: $(READY)
	@$(BIN)/python tools/bench.py

bench-quick: $(READY)
	@$(BIN)/python tools/bench.py --quick --output build/bench

format: $(READY)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
