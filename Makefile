# make demo   the whole road on made hands and data: make, prepare, train, evaluate; tables and pictures in output/demo/
# make test   lint and tests
# VENV=DIR    use (or make) the environment there; PYTHON=... the interpreter it is made with
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.dir-ready

.PHONY: demo test setup clean
.DEFAULT_GOAL := test

setup: $(READY)

$(READY): requirements.txt requirements-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

demo: $(READY)
	$(BIN)/python apps/run_demo.py

test: $(READY)
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --cov --cov-report=term

clean:
	rm -rf output/demo .pytest_cache .ruff_cache .coverage*
