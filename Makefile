# Every target sets itself up: .venv is made and filled once, and again when the pins change.
PYTHON ?= python3
# Extra options of pip, for a mirror or another torch: make setup PIP_ARGS="--index-url ..."
PIP_ARGS ?=
MODEL ?=
LIMIT ?=
GPUS ?=
SEEDS ?=
LRS ?=
# Jobs that share a GPU; or so many threads of the CPU, one job each.
WORKERS ?=
SLOTS ?=
DRY ?=
# Further options: make reproduce-table2 ARGS="dataset.path=data/gsm8k eval.data_path=data"
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
GRID = $(if $(MODEL),model=$(MODEL)) $(if $(LIMIT),limit=$(LIMIT)) $(if $(GPUS),gpus=$(GPUS)) \
       $(if $(SEEDS),seeds=$(SEEDS)) $(if $(LRS),lrs=$(LRS)) $(if $(WORKERS),workers_per_gpu=$(WORKERS)) \
       $(if $(SLOTS),slots=$(SLOTS)) $(if $(DRY),dry=$(DRY)) $(ARGS)
SMOLLM2 := models/SmolLM2-135M-Instruct

.PHONY: help setup quickstart test test-all lint format report smollm2 gemma3 reproduce-table2 \
        reproduce-table3 reproduce-smollm2 reproduce-gemma3 benchmark-training \
        benchmark-scaling benchmark-sweep

help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-20s %s\n", $$1, $$2}'

setup: $(STAMP) ## make .venv and install the pinned dependencies

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make setup PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	# First alone, so that a CPU-only torch can be chosen before anything asks for another.
	$(BIN)/python -m pip install $(PIP_ARGS) --quiet -c constraints.txt torch
	$(BIN)/python -m pip install $(PIP_ARGS) --quiet -c constraints.txt -e '.[dev,slurm,gguf,dashboard,trl,quant]'
	@touch $@

quickstart: setup ## fine-tune the embedded model once and read it at every rank, in about 2 minutes
	$(BIN)/python train.py

test: setup ## run the tests (CPU, no network, a few minutes)
	$(BIN)/python -m pytest -n 2

test-all: setup ## run the slow tests too
	$(BIN)/python -m pytest -m 'not gpu'

lint: setup ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup ## put the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

report: setup ## rewrite results/tables and results/figures from the committed records
	$(BIN)/python scripts/report.py

smollm2: setup ## prepare a local copy of SmolLM2-135M-Instruct in models/
	$(BIN)/python scripts/prepare_model.py smollm2

gemma3: setup ## prepare a local copy of Gemma 3 270M (Gemma Terms of Use) in models/
	$(BIN)/python scripts/prepare_model.py gemma3

reproduce-table2: setup ## rank-accuracy on GSM8K (MODEL=tiny: on the embedded data); DRY=1 only plans
	$(BIN)/python scripts/reproduce.py table2 $(GRID)

reproduce-table3: setup ## Open-Platypus, then ARC-Challenge and HellaSwag; DRY=1 only plans
	$(BIN)/python scripts/reproduce.py table3 $(GRID)

# One after the other; each goes on where it was stopped.
reproduce-smollm2: setup ## every method at its own rate on GSM8K with SmolLM2, ablations, fewer records; DRY=1 only plans
	$(BIN)/python scripts/prepare_model.py smollm2
	$(BIN)/python scripts/reproduce.py smollm2 only=search model.path=$(SMOLLM2) $(GRID)
	$(BIN)/python scripts/reproduce.py smollm2 only=final model.path=$(SMOLLM2) $(GRID)
	$(BIN)/python scripts/reproduce.py smollm2_ablations model.path=$(SMOLLM2) $(GRID)
	$(BIN)/python scripts/reproduce.py smollm2_ideas model.path=$(SMOLLM2) $(GRID)
	$(BIN)/python scripts/reproduce.py smollm2_data model.path=$(SMOLLM2) $(GRID)
	$(BIN)/python scripts/reproduce.py smollm2 only=also model.path=$(SMOLLM2) $(GRID)
	$(if $(DRY),,$(BIN)/python scripts/diagnostics.py records=results/records/smollm2)

reproduce-gemma3: setup ## nested and dedicated LoRAs on GSM8K with Gemma 3 270M; DRY=1 only plans
	$(BIN)/python scripts/prepare_model.py gemma3
	$(BIN)/python scripts/reproduce.py gemma3_270m model.path=models/gemma-3-270m $(GRID)

# Write to results/benchmarks-local; ARGS="output=results/benchmarks" adds to the committed results.
benchmark-training: setup ## tokens/s against PEFT under the HF Trainer; real shapes on a GPU
	$(BIN)/python scripts/benchmark_training.py $(ARGS)

benchmark-scaling: setup ## training, sweep and a grid on 1, 2 and 4 GPUs of this host
	$(BIN)/python scripts/benchmark_scaling.py $(ARGS)

benchmark-sweep: setup ## the rank sweep against lm-eval's HF backend; real shapes on a GPU
	$(BIN)/python scripts/benchmark_sweep.py $(ARGS)
