# make demo   a first video on a CPU, in about a minute after set-up
# make test   the test suite (no GPU needed)
# make lint   ruff and mypy

PYTHON ?= python3
VENV ?= .venv
PROMPT ?= a big red fox runs to the right through the snow

BIN := $(VENV)/bin

.PHONY: demo test lint
demo: $(VENV)/.base-installed
	$(BIN)/turbodit generate "$(PROMPT)" --seed 0 --output outputs/demo.mp4 --force

test: $(VENV)/.dev-installed
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile

lint: $(VENV)/.dev-installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# Each stamp stands for "installed as pyproject.toml says"; a change of that file installs again.
$(VENV)/.base-installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.dev-installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@ $(VENV)/.base-installed

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
