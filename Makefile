# `make lab` and `make test` set up their own environment in .venv, pinned by constraints.txt.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: lab test test-all test-gpu lint clean

lab: .venv/ready
	$(BIN)/python run.py -cn lab

# Two workers on two cores; each test's stages set their own threads.
test: .venv/ready-dev .wandb-server/ready lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m "not slow"

# With the tests that take minutes: joblib, submitit and ray.
test-all: .venv/ready-dev .wandb-server/ready lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

# On a machine with a GPU, and torch for it.
test-gpu: .venv/ready-dev
	$(BIN)/python -m pytest -m gpu

lint: .venv/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet -c constraints.txt -e .
	touch $@

.venv/ready-dev: .venv/ready tests/ray.txt
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev,slurm,loftq,dashboard]'
	$(BIN)/pip install --quiet --no-deps -r tests/ray.txt || echo "no ray here: its test is skipped"
	touch $@

# A server that speaks W&B's protocol, for tests only and apart: its licence is non-commercial. Without it they are skipped.
.wandb-server/ready:
	$(PYTHON) -m venv .wandb-server
	.wandb-server/bin/pip install --quiet openwandb==0.5.25 || echo "no W&B-compatible server: its tests are skipped"
	touch $@

clean:
	rm -rf .venv .wandb-server
