# Everything is set up in .venv on the first use. PYTHON=python3.12 make ... takes another interpreter.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
SEEDS = 0 1 2
LEVELS = token sequence

.PHONY: quickstart test lint slow quickstarts

quickstart: $(VENV)/ready ## train a small model on arithmetic word problems
	$(BIN)/python examples/quickstart.py

test: $(VENV)/ready ## the tests that a developer runs
	$(BIN)/python -m pytest --cov

lint: $(VENV)/ready ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

slow: $(VENV)/ready ## the tests that take over half a minute each
	$(BIN)/python -m pytest -m slow --durations=0

quickstarts: $(VENV)/ready ## the quickstart for three seeds at both levels; fails if one learns too little
	$(foreach level,$(LEVELS),$(foreach seed,$(SEEDS),$(BIN)/python examples/quickstart.py --loss_level $(level) \
		--seed $(seed) --output_dir outputs/quickstart-$(level)-$(seed) | tail -n 1 | tee -a outputs/quickstarts.txt &&)) true

# torch first and by itself, so that a build that is already there for this machine is taken.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@
