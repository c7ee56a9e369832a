PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
# Tests that run side by side; those with many ranks take more cores than one.
WORKERS ?= 2

BIN := $(VENV)/bin
PIP := python -m pip install --disable-pip-version-check
PYTEST := $(BIN)/pytest -n $(WORKERS) --dist worksteal
PIP_INSTALL := $(BIN)/$(PIP) -c constraints.txt
SPEC := pyproject.toml constraints.txt
# The compiler of triton-ascend, whose module is called triton too: an environment of its own, which
# finds everything else in the one beside it.
ASCEND := $(VENV)/ascend
# vLLM and SGLang need other versions of transformers and of much else: an environment each.
# Megatron-Core finds what it needs in the main one.
ENGINES := vllm megatron
ENGINES_FULL := $(ENGINES) sglang
# msprobe brings much that nothing else needs.
MSPROBE := $(VENV)/msprobe

# Tests of ops that also run on the Triton kernels, in Triton's interpreter.
INTERPRETED := tests/test_expert_parallel_rows.py \
	tests/ascend/distributed/test_quant_modes.py
INTERPRETED_FULL := $(INTERPRETED) tests/test_fixed_shapes.py \
	$(wildcard tests/ascend/distributed/test_hypothesis_*.py) \
	tests/ascend/distributed/test_combine_add_rms_norm.py \
	$(addprefix tests/test_expert_parallel,.py _errors.py _lifecycle.py) \
	$(addprefix tests/ascend/distributed/test_,resolutions.py split_phase.py torch_npu.py torch_npu_v2.py) \
	tests/ascend/local/test_update_expert.py

# Definitions, kernels, profiles and the layer: no compilers, no faults, no long draws.
QUICK := tests/profile tests/eplb tests/kernels $(addprefix tests/test_,layers.py \
	topology.py errors.py load.py fixed_shapes.py expert_parallel.py expert_parallel_rows.py \
	docs.py readme.py) tests/bench/test_report.py --ignore=tests/kernels/test_compiled.py \
	--ignore=tests/kernels/ascend

# A job has a limit of its own.
ENGINE_TESTS = -o faulthandler_timeout=1200 tests/engines $(PYTEST_ARGS)

.PHONY: help demo test test-quick test-full test-engines test-engines-full mutants lint pages docs clean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.test ## a MoE layer over 8 processes, checked against the dense layer
	$(BIN)/moe-triton demo

test: $(VENV)/.test $(ASCEND)/.tried ## the tests, about 25 minutes on two cores
	$(PYTEST) $(PYTEST_ARGS)
	$(if $(PYTEST_ARGS),,MOE_TRITON_BACKEND=interpret $(PYTEST) $(INTERPRETED))

test-quick: $(VENV)/.test ## a part of the tests, under 3 minutes on two cores
	$(PYTEST) $(QUICK) $(PYTEST_ARGS)

test-full: $(VENV)/.test $(ASCEND)/.tried $(MSPROBE)/.tried ## the tests and long runs; rewrites docs/evidence/test-full.md
	MOE_TRITON_TEST_PROFILE=full $(PYTEST) -m "full or not full" -o faulthandler_timeout=3600 \
		--evidence=docs/evidence/test-full.md $(PYTEST_ARGS)
	$(if $(PYTEST_ARGS),,MOE_TRITON_BACKEND=interpret $(PYTEST) $(INTERPRETED_FULL))

test-engines: $(VENV)/.test $(ENGINES:%=$(VENV)/%/.ready) ## vLLM itself and clients of DeepEP, about 5 minutes on two cores
	$(BIN)/pytest -m "engines and not full" $(ENGINE_TESTS)

test-engines-full: $(VENV)/.test $(ENGINES_FULL:%=$(VENV)/%/.ready) ## all engines, models and sizes
	$(BIN)/pytest -m engines $(ENGINE_TESTS)

mutants: $(VENV)/.test ## break the kernels one change at a time; rewrites docs/evidence/mutants.md
	$(BIN)/python tests/support/mutate.py --evidence=docs/evidence/mutants.md

lint: $(VENV)/.dev ## ruff (rules and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

pages: $(VENV)/.test ## rewrite what the code says in docs/ and README.md: operators, results, picture
	$(BIN)/python docs/ascend.py
	$(BIN)/python docs/layer.py
	$(BIN)/python bench/report.py

docs: pages $(VENV)/.docs ## build the pages and the API reference into docs/_build/html
	$(BIN)/python -m sphinx -q -W --keep-going -b html -d docs/_build/doctrees docs docs/_build/html

clean: ## remove the virtual environment, caches and build output
	rm -rf $(VENV) build dist docs/_build *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find moe_triton tests bench examples -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

# A stamp is newer than the files it depends on only if the installation went through.
$(VENV)/.test: $(SPEC) | $(BIN)/python
	$(PIP_INSTALL) -e ".[test]"
	@touch $@

$(VENV)/.dev: $(SPEC) | $(VENV)/.test
	$(PIP_INSTALL) -e ".[dev]"
	@touch $@

$(VENV)/.docs: $(SPEC) | $(VENV)/.test
	$(PIP_INSTALL) -e ".[docs]"
	@touch $@

# Where there is no wheel of it, the test that needs it says so and is skipped.
$(ASCEND)/.tried: constraints-ascend.txt | $(VENV)/.test
	$(BIN)/python -m venv $(ASCEND)
	$(ASCEND)/bin/$(PIP) --no-deps -r $< \
		&& $(BIN)/python tests/support/triton_ascend_env.py $(ASCEND) \
		|| echo "triton-ascend cannot be installed here"
	@touch $@

# The lists are complete, so that nothing is resolved; the engine's own wheel is pinned by its hash.
$(VENV)/%/.ready: tests/engines/%.txt tests/engines/%-wheel.txt pyproject.toml | $(BIN)/python
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/$(PIP) --no-deps --require-hashes -r tests/engines/$*-wheel.txt
	$(@D)/bin/$(PIP) --no-deps -r tests/engines/$*.txt
	$(@D)/bin/$(PIP) --no-deps -e .
	@touch $@

$(VENV)/megatron/.ready: tests/engines/megatron-wheel.txt pyproject.toml | $(VENV)/.test
	$(BIN)/python -m venv $(@D)
	$(@D)/bin/$(PIP) --no-deps --require-hashes -r $<
	$(@D)/bin/$(PIP) --no-deps -e .
	$(BIN)/python tests/support/triton_ascend_env.py $(@D)
	@touch $@

$(MSPROBE)/.tried: constraints-msprobe.txt | $(VENV)/.test
	$(BIN)/python -m venv $(MSPROBE)
	$(MSPROBE)/bin/python -m pip install --disable-pip-version-check --no-deps -r $< \
		&& $(BIN)/python tests/support/triton_ascend_env.py $(MSPROBE) \
		|| echo "msprobe cannot be installed here"
	@touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
