# Every target runs in .venv when it is there, in the active environment otherwise.
# make setup PYTHON=python3.12            another interpreter
# make setup TORCH="torch==2.12.0"        another torch; pip options are allowed here, such as --index-url of PyTorch's CPU or ROCm builds
# make test  TEST_ARGS="-n 8"             other options for pytest
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV ?= .venv
ifneq ($(PYTHON),)
  PY := $(PYTHON)
else ifneq ($(wildcard $(VENV)/bin/python),)
  PY := $(abspath $(VENV)/bin/python)
else
  PY := python
endif

# The tools of the environment (ruff, pyright, torchrun, deepspeed, ninja) must be found by what the targets start.
ifneq ($(findstring /,$(PY)),)
  export PATH := $(dir $(PY)):$(PATH)
endif

EXTRAS ?= train,eval,demo,dev
TEST_ARGS ?= -n 2

# Tests are offline by construction; this makes a forgotten download fail at once instead of hanging.
TEST_ENV := HF_HUB_OFFLINE=1 WANDB_MODE=offline TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1

# MKL's reproducible mode: the same bits whatever the memory alignment, and on AMD processors faster for few rows.
BENCH_ENV := MKL_CBWR=$(or $(MKL_CBWR),AUTO)

.PHONY: help setup check format test test-gpu demo bench clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.ready ## Make .venv and install the two packages with everything they need (repeat: nothing to do)

$(VENV)/.ready: pyproject.toml
	@PYTHON='$(PYTHON)' TORCH='$(TORCH)' bash scripts/lib/setup.sh "$(VENV)" "$(EXTRAS)"
	@touch "$@"
	@echo "setup: done; . $(VENV)/bin/activate"

check: ## Formatting, lint, types and the structural rules; changes nothing
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m pyright
	$(PY) -m pytest -q -p no:cacheprovider tests/structure

format: ## Apply the formatter and the safe lint fixes
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

test: ## All tests that need no accelerator
	$(TEST_ENV) $(PY) -m pytest -m "not gpu" $(TEST_ARGS)

test-gpu: ## The tests that need a CUDA or ROCm device (skipped, with the reason, where there is none)
	$(PY) -m pytest -m gpu

demo: ## Train and evaluate LLaVA with DUET in the tiny world
	bash scripts/finetune_duet.sh

bench: ## Prefill and training step, full tokens against DUET, next to what the FLOPs predict; then batched evaluation
	$(BENCH_ENV) $(PY) -m duet.bench $(BENCH_ARGS)
	$(BENCH_ENV) $(PY) -m llava.eval.bench $(EVAL_BENCH_ARGS)

clean: ## Remove caches and build leftovers (keeps .venv, data and checkpoints)
	rm -rf .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find duet llava playground scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +
