# The two commands are `make compress` and `make test`; both set up .venv by themselves.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RECIPE ?= mini
ARGS ?=

.PHONY: compress test test-slow lint format bench clean

compress: $(VENV)/.ready
	$(BIN)/trimlingual compress $(RECIPE) $(ARGS)

test: $(VENV)/.ready
	$(BIN)/python -m pytest $(ARGS)

test-slow: $(VENV)/.ready
	$(BIN)/python -m pytest -m slow $(ARGS)

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

bench: $(VENV)/.ready
	$(BIN)/python benchmarks/mini_compress.py

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache
