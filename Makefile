# Each target sets itself up from nothing. The environment is rebuilt when what it is made of changes.
#
#   make demo        train four adapters, serve them, compare them with the base model
#   make test        all tests          (make test ARGS="tests/storage -k publish")
#   make lint        format, lint, types
#
# Without an NVIDIA GPU, torch is held to the tested version, so that a CPU wheel pip knows of (PIP_FIND_LINKS,
# PIP_EXTRA_INDEX_URL) is taken; with one, any torch that pyproject.toml allows.

PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
HAS_GPU := $(shell command -v nvidia-smi 2>/dev/null)

.PHONY: demo test lint clean

demo: $(STAMP)
	$(BIN)/flora demo $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadgroup --no-loadscope-reorder $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(if $(HAS_GPU),grep -vE '^(torch|triton)==' constraints.txt,cat constraints.txt) > $(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet --constraint $(VENV)/constraints.txt --editable '.[dev]'
	touch $@
