# make demo   the whole pipeline on synthetic data: synthesize, prepare, train, evaluate, report; results in output/demo/
# make test   format, lint, types, layers and tests
# make coverage   the tests again, with the lines that they do not reach (half as long again)
# make clean  remove the demo's output and caches
# VENV=DIR    use, or create, the environment DIR; PYTHON=... the interpreter to create it with
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
READY := $(VENV)/.dir-ready

.PHONY: demo test coverage lint setup clean
.DEFAULT_GOAL := test

setup: $(READY)

$(READY): requirements.txt requirements-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

demo: $(READY)
	$(BIN)/python apps/run_demo.py

lint: $(READY)
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy

test: lint
	$(PYTEST)

coverage: $(READY)
	$(PYTEST) --cov --cov-report=term

clean:
	rm -rf output/demo .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .coverage*
