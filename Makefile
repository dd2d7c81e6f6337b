# make demo   optimize four real functions and print what was found, proven and gained
# make test   run the tests
# make check  run everything that CI runs
# Each makes and keeps its own environment in .venv; nothing has to be installed by hand.

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -W ignore -m pip install -qq --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := test
.PHONY: demo test check lint format bench clean

demo: $(STAMP)
	$(BIN)/python examples/demo.py

test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

check: test lint

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python -m benchmarks cpu

# PYTHON may name the interpreter; otherwise the first of these that is 3.11, 3.12 or 3.13 is taken.
$(BIN)/python:
	@for candidate in $(PYTHON) python3 python3.13 python3.12 python3.11; do \
	  if "$$candidate" -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	      2>/dev/null; then \
	    echo "making $(VENV) with $$($$candidate --version)"; \
	    exec "$$candidate" -m venv $(VENV); \
	  fi; \
	done; \
	echo "superopt needs Python 3.11, 3.12 or 3.13 with venv: none was found; name one with PYTHON=..." >&2; \
	exit 1

$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV) (minutes the first time)"
	@$(PIP) torch==2.13.0
	@$(PIP) --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
