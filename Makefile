# Everything a fresh machine needs: `make train` and `make test` set up .venv by themselves.
VENV ?= .venv
PYTHON ?= python3
SEED ?= 0
RUN ?= runs/quickstart
DATA ?= $(RUN)-data
CONFIG ?= vgpo_train/configs/quickstart.yaml
PROCESSES ?= 2
OVERRIDES ?=

# Programs of the environment come first: DeepSpeed's launcher looks for its tools on the PATH.
export PATH := $(abspath $(VENV))/bin:$(PATH)
READY := $(VENV)/.ready

.PHONY: help setup train test bench lint clean
.DEFAULT_GOAL := help

help: ## Show this list.
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-8s %s\n", $$1, $$2}'

setup: $(READY) ## Make the environment in .venv.

$(READY): pyproject.toml scripts/setup.sh
	scripts/setup.sh $(VENV) $(PYTHON)
	@touch $@

train: $(READY) ## Pictures, checkpoint, then the main job; results in runs/quickstart. SEED=1 and others work too.
	python -m vgpo_train.make_pictures $(DATA)/pictures
	python -m vgpo_train.tiny_model $(DATA)/checkpoint --pictures $(DATA)/pictures --seed $(SEED)
	deepspeed --num_gpus $(PROCESSES) vgpo_train/main.py --config $(CONFIG) \
		model.path=$(DATA)/checkpoint data.train=$(DATA)/pictures/train.jsonl data.test=$(DATA)/pictures/test.jsonl \
		output_dir=$(RUN) seed=$(SEED) resume=auto $(OVERRIDES)

test: $(READY) ## Run all tests.
	python -m pytest tests

bench: $(READY) ## Run the benchmarks.
	python -m pytest benchmarks --benchmark-only

lint: $(READY) ## Check style and types.
	ruff check .
	ruff format --check .
	mypy

clean: ## Remove the quickstart's results.
	rm -rf $(RUN) $(DATA)
