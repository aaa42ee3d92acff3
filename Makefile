# Everything a fresh machine needs: `make train` and `make test` set up .venv by themselves.
VENV ?= .venv
PYTHON ?= python3
SEED ?= 0
RUN ?= runs/quickstart$(if $(filter-out 0,$(SEED)),-seed$(SEED))
DATA ?= $(RUN)-data
CONFIG ?= vgpo_train/configs/quickstart.yaml
# Two processes show ZeRO-3 at work without a GPU; a machine with one GPU has room for one.
PROCESSES ?= $(if $(filter 1,$(shell nvidia-smi -L 2>/dev/null | grep -c GPU)),1,2)
OVERRIDES ?=
# What `make bench` measures and where it leaves it; what the machine is called there.
CASES ?= small
MACHINE ?= $(shell hostname)
RESULTS ?= benchmarks/results/$(MACHINE).json
# A free port, so that two runs on a machine do not meet.
PORT ?= $(shell $(PYTHON) -c "import socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); print(s.getsockname()[1])")

# Programs of the environment come first: DeepSpeed's launcher looks for its tools on the PATH.
export PATH := $(abspath $(VENV))/bin:$(PATH)
READY := $(VENV)/.ready
NATIVE := $(VENV)/.native
# vLLM wants versions of its own.
VLLM_VENV ?= .venv-vllm
EXTENSION := vgpo_kernels/_csrc.abi3.so

.PHONY: help setup native train test vllm-test bench lint clean
.DEFAULT_GOAL := help

help: ## Show this list.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-9s %s\n", $$1, $$2}'

setup: $(READY) ## Make the environment in .venv.

$(READY): pyproject.toml scripts/setup.sh
	scripts/setup.sh $(VENV) $(PYTHON)
	@touch $@

# The set-up has built them already. Where they do not build, the old ones must not stay: their reference runs instead.
$(NATIVE): $(wildcard csrc/*.* csrc/*/*) setup.py | $(READY)
	@for file in $^; do test $(EXTENSION) -nt $$file || rm -f $(EXTENSION); done
	python setup.py --quiet build_ext --inplace
	@test ! -f $(EXTENSION) || touch $@

native: $(NATIVE) ## Build the CPU kernels of csrc/ again, or say why they cannot be.
	@python -c "import sys; from vgpo_kernels import _native; sys.exit(_native.missing())"

train: $(DATA)/checkpoint/.ready $(NATIVE) ## Pictures, checkpoint, then the main job: runs/quickstart. SEED=1 makes another run.
	deepspeed --num_gpus $(PROCESSES) --master_port $(PORT) vgpo_train/main.py --config $(CONFIG) \
		model.path=$(DATA)/checkpoint data.train=$(DATA)/pictures/train.jsonl data.test=$(DATA)/pictures/test.jsonl \
		output_dir=$(RUN) seed=$(SEED) resume=auto $(OVERRIDES)

$(DATA)/pictures/.ready: | $(READY)
	python -m vgpo_train.quickstart.pictures $(DATA)/pictures
	@touch $@

$(DATA)/checkpoint/.ready: $(DATA)/pictures/.ready
	python -m vgpo_train.quickstart.tiny_model $(DATA)/checkpoint --pictures $(DATA)/pictures --seed $(SEED)
	@touch $@

# The record says of which commit the tests were green: figures measured after it can be reported.
test: $(NATIVE) ## Run all tests.
	python -m pytest tests --record .tests.json

$(VLLM_VENV)/.ready: scripts/setup_vllm.sh
	scripts/setup_vllm.sh $(VLLM_VENV) $(PYTHON)
	@touch $@

vllm-test: $(VLLM_VENV)/.ready $(NATIVE) ## Run the tests with vLLM for CPUs, in an environment of their own: .venv-vllm.
	PYTHONPATH=$(CURDIR) $(VLLM_VENV)/bin/python -m pytest tests/with_vllm

bench: $(NATIVE) ## Run the benchmarks: RESULTS=FILE, CASES=small|paper|all.
	@mkdir -p $(dir $(RESULTS))
	python -m pytest benchmarks --benchmark-only --cases $(CASES) --benchmark-json $(RESULTS)

lint: $(READY) ## Check style, types and words.
	ruff check .
	ruff format --check .
	mypy
	scripts/check_words.sh

clean: ## Remove the quickstart's results.
	rm -rf $(RUN) $(DATA)
