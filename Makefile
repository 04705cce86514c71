# The README's commands. Each makes the environment it needs and repeats nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# exact pins of the Python at hand; a newer Python falls back to the newest list
PIN = $(shell $(PYTHON) -c "import sys; print('constraints/py311.txt' if sys.version_info < (3, 12) else 'constraints/py312.txt')")

.PHONY: sample live test test-hopper clean

sample: $(VENV)/.core
	$(BIN)/python sample.py $(ARGS)

live: $(VENV)/.core
	$(BIN)/python -m sanawm_jax.live $(ARGS)

# files in their order, which has the long ones of whole runs first: both workers end together
test: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests $(ARGS)
	$(BIN)/python -m pytest -n 2 tests/multi_device $(ARGS)

# The kernels for Hopper run in an interpreter that only JAX for Python 3.12 has, and are compiled for
# an H100 that is not here. They need nothing but JAX and its compiler for CUDA.
PYTHON312 ?= python3.12
HOPPER := .venv-hopper

test-hopper: $(HOPPER)/.done
	$(HOPPER)/bin/python -m pytest -n 2 tests/kernels/test_gdn_hopper.py tests/kernels/test_compiles_for_hopper.py $(ARGS)

$(HOPPER)/.done: constraints/py312.txt constraints/hopper.txt
	$(PYTHON312) -m venv $(HOPPER)
	$(HOPPER)/bin/python -m pip install --quiet --constraint $< jax pytest pytest-xdist
	$(HOPPER)/bin/python -m pip install --quiet --no-deps --requirement constraints/hopper.txt
	touch $@

$(VENV)/.core: setup.cfg setup.py pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'sanawm_jax needs Python 3.11 or newer: make PYTHON=python3.11 ...')"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint $(PIN) --editable '.[live]'
	touch $@

# torch first, by its exact version: that is the one with a CPU build where there is no GPU
$(VENV)/.test: $(VENV)/.core
	$(BIN)/python -m pip install --quiet --constraint $(PIN) torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint $(PIN) --editable '.[live,test,dev]'
	touch $@

clean:
	rm -rf $(VENV) $(HOPPER) build *.egg-info
