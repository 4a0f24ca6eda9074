# `make help` lists the targets. All paths are relative, so that a clone may live in a folder with spaces in its name.

PYTHON ?= python3
CONFIG ?= ds_configs/zero2_lowrank.json
ARGS ?=
PORT ?=

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
CUDA_VENV := .venv-cuda

# Compiling modules again in every process costs ten seconds and more at each start.
export PYTHONDONTWRITEBYTECODE :=

# A folder that was moved or copied is set up again: the installation holds absolute paths.
ifneq "$(shell cat $(STAMP) 2>/dev/null)" "$(CURDIR)"
.PHONY: $(STAMP)
endif

.PHONY: help setup pretrain test test-all dist soak mutants test-gpu cuda-compile cuda-check docs docs-links lint format clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

setup: $(STAMP) ## make .venv with the versions of requirements.txt

pretrain: $(STAMP) ## pretrain the default model; ARGS="--steps 100 ..." adds flags, CONFIG=... takes another JSON, PORT=... a port (default: a free one)
	$(info deepspeed launchers/pretrain.py --deepspeed $(CONFIG) $(ARGS))
	@$(ON_CPU) $(DEEPSPEED) --master_port $(FREE_PORT) launchers/pretrain.py --deepspeed "$(CONFIG)" $(ARGS)

# Two workers, each of which takes the next file, in the order of tests/conftest.py; a test may have four processes itself.
PYTEST = $(PY) -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder
TEST_WORKERS ?= 2

test test-all: export OMP_NUM_THREADS ?= 1

test: lint ## lint, and the daily tests, which have 15 minutes on two cores
	$(PYTEST) -m "not slow" --budget

test-all: lint ## lint, and every test
	$(PYTEST)

dist: $(STAMP) ## build an sdist and a wheel in dist/, and try both outside of the checkout; ARGS="--borrow --no-comparison ..."
	$(PY) -m tests.installed $(ARGS)

soak: export OMP_NUM_THREADS ?= 1

soak: $(STAMP) ## give thousands of bad inputs to every program, and write docs/reliability.md; ARGS="--kind flags --limit 50 ..."
	$(PY) -m tests.soak docs/reliability.md $(ARGS)

mutants: $(STAMP) ## plant faults, one at a time, and list those that no daily test notices; hours; ARGS="--area rules ..."
	$(PY) -m tests.mutants $(ARGS)

test-gpu: $(STAMP) ## the compiled ops on a GPU against their references on the CPU; skipped, with the reason, without one
	$(PY) -m pytest tests/kernels/test_gpu.py

cuda-compile: $(STAMP) ## compile the CUDA kernels for every architecture, print registers and spills; needs nvcc, no GPU
	$(PY) csrc/check_cuda.py

cuda-check: $(CUDA_VENV)/.installed ## cuda-compile, then link with a CUDA build of torch and import; 5.5 GB in .venv-cuda
	$(CUDA_VENV)/bin/python csrc/check_cuda.py --link

docs: $(VENV)/.docs ## build the documentation into build/docs; a warning, a dead link or a wrong name is an error
	$(SPHINX) -b html docs build/docs
	@echo "open build/docs/index.html; build/docs/links.txt lists the external links"

docs-links: $(VENV)/.docs ## ask every external link of the documentation for an answer; needs the network
	$(SPHINX) -b linkcheck docs build/docs-links

lint: $(STAMP) ## ruff, and mypy on megalr/
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(STAMP) ## rewrite the code as ruff would have it
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean: ## remove .venv, .venv-cuda and every cache; runs/ stays
	rm -rf $(VENV) $(CUDA_VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

FREE_PORT = $(or $(PORT),$(shell $(PY) -c "import socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); print(s.getsockname()[1])"))

# The same as the `deepspeed` command, whose first line cannot name an interpreter in a folder with spaces.
DEEPSPEED = PATH="$$PWD/$(VENV)/bin:$$PATH" $(PY) -m deepspeed.launcher.runner

# Where there is no GPU: two processes, so that the shards are real, which share the cores. DeepSpeed reads LOCAL_SIZE
# for its number of processes on a CPU only; with GPUs every GPU gets one. glibc shall keep what is freed: the kernel would
# hand it out again page by page, zeroed.
CORES := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
CPU_RANKS := $(shell [ $(CORES) -gt 1 ] && echo 2 || echo 1)
ON_CPU = MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=$$((1 << 40)) LOCAL_SIZE=$${LOCAL_SIZE:-$(CPU_RANKS)} OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$(shell echo $$(($(CORES) / $(CPU_RANKS))))}

$(STAMP): requirements.txt requirements-compare.txt setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "megalr needs Python 3.11 or newer, and $(PYTHON) is not: $$($(PYTHON) --version 2>&1). Name another one, as in: make $(MAKECMDGOALS) PYTHON=python3.12"; \
		exit 1; }
	@echo "Setting up .venv: PyTorch, DeepSpeed and what goes with them are downloaded and installed, once."
	@$(PY) -c '' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV) || { \
		echo "$(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@$(PY) -m pip install -qq --disable-pip-version-check --no-compile -r requirements.txt
	@$(PY) -m pip install -qq --disable-pip-version-check --no-compile --no-deps -r requirements-compare.txt
	@MEGALR_BUILD_OPS=1 $(PY) -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e . || { \
		echo "megalr's compiled ops cannot be built; without them torch computes the same, more slowly"; \
		$(PY) -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .; }
	@DS_ACCELERATOR=cpu $(PY) -c "$(WARM_UP)"
	@echo "$(CURDIR)" > $@

# All pages are read anew, since much of them is made from the code.
SPHINX = $(PY) -m sphinx --fresh-env --nitpicky --fail-on-warning --keep-going --quiet

$(VENV)/.docs: $(STAMP) requirements-docs.txt
	@$(PY) -m pip install -qq --disable-pip-version-check --no-compile -r requirements-docs.txt
	@touch $@

$(CUDA_VENV)/.installed: requirements-cuda.txt
	@echo "Setting up $(CUDA_VENV): a CUDA build of PyTorch is downloaded and installed, 5.5 GB, once."
	@$(CUDA_VENV)/bin/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear $(CUDA_VENV)
	@$(CUDA_VENV)/bin/python -m pip install -qq --disable-pip-version-check --no-compile -r requirements-cuda.txt
	@touch $@

# Compiles what a run imports, and nothing of the rest; a broken installation shows here.
WARM_UP = import deepspeed, datasets, matplotlib.figure, torch.utils.tensorboard; from transformers import LlamaForCausalLM
