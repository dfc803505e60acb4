# make demo: the full pipeline on built-in text
# make lint, make test, make test-slow: required for every change; test-slow starts many ranks and a Slurm cluster
# PYTHON=python3.12 sets the interpreter, VENV=path the virtual environment.
PYTHON ?= $(firstword $(foreach name,python3.12 python3.11 python3,$(shell $(name) -c 'print("$(name)")' 2>/dev/null)))
VENV ?= .venv
PY := $(VENV)/bin/python

.PHONY: demo test test-slow test-all mutants lint clean

demo: $(VENV)/.demo
	$(PY) -m benchmarks.demo

test: $(VENV)/.dev
	$(PY) -m pytest -n 2 -m "not slow and not slurm"

test-slow: $(VENV)/.dev
	$(PY) -m pytest -n 2 -m "slow or slurm"

test-all: $(VENV)/.dev  # Slurm tests run separately: they depend on its timers
	$(PY) -m pytest -n 2 -m "not slurm"
	$(PY) -m pytest -m slurm

mutants: $(VENV)/.dev  # break each guard in turn; its test must fail
	$(PY) -m tests.mutants

lint: $(VENV)/.dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --pythonpath $(PY)

$(VENV)/.demo: requirements.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] < (3, 14) else "error: Python 3.11, 3.12 or 3.13 is needed, not " + sys.version.split()[0] + "; try: make demo PYTHON=python3.12")'
	@echo "Installing requirements.txt into $(VENV): takes minutes, once"
	@test -x $(PY) || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "error: $(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --requirement requirements.txt
	@touch $@

$(VENV)/.dev: $(VENV)/.demo requirements-dev.txt requirements-transformers4.txt
	@$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --requirement requirements-dev.txt
	@rm -rf $(VENV)/transformers4
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --target $(VENV)/transformers4 --requirement requirements-transformers4.txt
	@touch $@

clean:
	rm -rf runs corpora exports .pytest_cache .ruff_cache
