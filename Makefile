PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart test test-slow combinations lint install clean

# Trains a 24-layer model on text that comes with Python; run it again and it finds nothing to do.
quickstart: $(VENV)/.installed
	$(BIN)/python launch/pretrain.py --config configs/quickstart.yaml

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not slow" tests

# Tests of minutes rather than seconds.
test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m slow tests

# Every pair of what a user can combine, in runs that are killed and resumed: an hour or two; goes on where it stopped.
combinations: $(VENV)/.installed-dev
	$(BIN)/python tests/combinations/run.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-cache

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-dev: pyproject.toml $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
