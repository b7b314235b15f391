PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The versions that the tests ran with. Another set: make test VENV=.venv-other CONSTRAINTS=FILE
CONSTRAINTS ?= constraints.txt
PIP_INSTALL := $(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable

.PHONY: quickstart test test-slow test-gpu bench combinations lint style types names words format install clean

# Trains a 24-layer model on text that comes with Python; a second run finds nothing to do.
quickstart: $(VENV)/.installed
	$(BIN)/python launch/pretrain.py --config configs/quickstart.yaml

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not slow" tests

# Tests that take minutes rather than seconds.
test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m slow tests

# Every pair of options that a user can combine, in runs that are killed and resumed: two to three hours; resumes if stopped.
combinations: $(VENV)/.installed-dev
	$(BIN)/python tests/combinations/run.py

# On a machine with a GPU, in minutes: what only a GPU can show, with a report in $(GPU_REPORT). GPU_PYTHON: any Python with
# torch, pytest and the requirements of stablelm; deepspeed and datasets are not needed (docs/performance.md).
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
GPU_REPORT ?= gpu-report
test-gpu:
	GPU_REPORT=$(GPU_REPORT) TORCHINDUCTOR_COMPILE_THREADS=8 $(GPU_PYTHON) -m pytest tests/gpu

# The table of docs/performance.md, in hours, with nothing else running; resumes if stopped.
# make bench BENCH="--peers-venv DIR --data DIR --tokenizer FILE"
bench: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/goals.py $(BENCH)

lint: style types names words

style: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/pyright
	$(BIN)/lint-imports --no-cache

# A method is one file: nothing else compares with the name of an axis value. No two classes share a name.
names: $(VENV)/.installed-dev
	$(BIN)/python tests/lint/axis_names.py
	$(BIN)/python tests/lint/class_names.py

# Phrases that documentation and messages avoid, with what to write instead.
words: $(VENV)/.installed-dev
	$(BIN)/python tests/lint/phrases.py

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) .
	touch $@

$(VENV)/.installed-dev: pyproject.toml $(CONSTRAINTS) $(VENV)/.installed
	$(PIP_INSTALL) '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
