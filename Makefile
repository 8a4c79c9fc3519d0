# Every target runs in .venv when it is there, in the active environment otherwise.
# make setup PYTHON=python3.12            another interpreter
# make setup TORCH="torch==2.12.0"        another torch; pip options are allowed here, such as --index-url of PyTorch's CPU or ROCm builds
# make setup LATEST=1                     the newest versions that pyproject.toml declares, not the locked ones
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

# What the environment was made of: a stamp of the other kind does not count.
STAMP := $(VENV)/.ready-$(if $(filter-out 0,$(LATEST)),latest,locked)

EXTRAS ?= train,eval,demo,dev
TEST_ARGS ?= -n 2

# Tests are offline by construction; this makes a forgotten download fail at once instead of hanging.
TEST_ENV := HF_HUB_OFFLINE=1 WANDB_MODE=offline TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1

# MKL's reproducible mode: the same bits whatever the memory alignment, and on AMD processors faster for few rows.
BENCH_ENV := MKL_CBWR=$(or $(MKL_CBWR),AUTO)

.PHONY: help setup lock check format test test-nodes test-sets test-gpu test-trl doctor demo bench clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## Make .venv with both packages and tested versions of all that they need (repeat: nothing to do)

$(STAMP): pyproject.toml scripts/lib/setup.sh $(wildcard scripts/lib/locked-*.txt)
	@rm -f "$(VENV)"/.ready*
	@PYTHON='$(PYTHON)' TORCH='$(TORCH)' LATEST='$(LATEST)' bash scripts/lib/setup.sh "$(VENV)" "$(EXTRAS)"
	@touch "$@"
	@echo "setup: done; . $(VENV)/bin/activate"

lock: ## Write the newest declared versions down as those that setup installs (then test them)
	@PYTHON='$(PYTHON)' TORCH='$(TORCH)' bash scripts/lib/lock.sh

doctor: ## Is this installation right? Versions, devices, compilers, disk, and a self-test of the arithmetic
	@$(PY) -m llava.cli doctor

check: ## Formatting, lint, types and the structural rules; changes nothing
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m pyright
	$(PY) -m pytest -q -p no:cacheprovider tests/structure

format: ## Apply the formatter and the safe lint fixes
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

test: ## All tests that need no accelerator
	$(TEST_ENV) $(PY) -m pytest -m "not gpu and not nodes" $(TEST_ARGS)

test-nodes: ## Long runs through the launchers: two emulated nodes (needs root), signals, another number of ranks
	$(TEST_ENV) $(PY) -m pytest -m "nodes and not gpu"

test-sets: ## Contract, golden and generation tests on the lowest and newest declared versions; a look beyond
	$(TEST_ENV) $(PY) scripts/lib/test_sets.py $(SETS) -- $(TEST_ARGS)

test-gpu: ## The tests that need a CUDA or ROCm device (skipped, with the reason, where there is none)
	$(PY) -m pytest -m gpu

test-trl: ## TRL's trainers on an attached model (installs the tested TRL into build/trl, outside of the environment)
	@[ -e build/trl/trl/__init__.py ] || $(PY) -m pip install --quiet --no-deps --target build/trl -r tests/trl_trainers/requirements.txt
	$(TEST_ENV) PYTHONPATH=$(CURDIR):$(CURDIR)/build/trl$(if $(PYTHONPATH),:$(PYTHONPATH)) $(PY) -m pytest tests/trl_trainers

demo: ## Train and evaluate LLaVA with DUET in the tiny world
	bash scripts/finetune_duet.sh

bench: ## Prefill and training step, full tokens against DUET, next to what the FLOPs predict; then batched evaluation
	$(BENCH_ENV) $(PY) -m duet.bench $(BENCH_ARGS)
	$(BENCH_ENV) $(PY) -m llava.eval.bench $(EVAL_BENCH_ARGS)

clean: ## Remove caches and build leftovers (keeps .venv, data and checkpoints)
	rm -rf .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find duet llava playground scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +
