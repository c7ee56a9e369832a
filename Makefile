PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=

BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
SPEC := pyproject.toml constraints.txt

.PHONY: help demo test test-full lint clean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.test ## a MoE layer over 8 processes, checked against the dense layer
	$(BIN)/moe-triton demo

test: $(VENV)/.test ## the tests
	$(BIN)/pytest $(PYTEST_ARGS)

test-full: $(VENV)/.test ## the tests and the long runs; rewrites docs/evidence/test-full.md
	MOE_TRITON_TEST_PROFILE=full $(BIN)/pytest -m "full or not full" -o faulthandler_timeout=3600 \
		--evidence=docs/evidence/test-full.md $(PYTEST_ARGS)

lint: $(VENV)/.dev ## ruff (rules and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean: ## remove the virtual environment, caches and build output
	rm -rf $(VENV) build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find moe_triton tests bench examples -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

# A stamp is newer than the files it depends on only if the installation went through.
$(VENV)/.test: $(SPEC) | $(BIN)/python
	$(PIP_INSTALL) -e ".[test]"
	@touch $@

$(VENV)/.dev: $(SPEC) | $(VENV)/.test
	$(PIP_INSTALL) -e ".[dev]"
	@touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
