# make train: the main job.  make test: the tests.  Each works alone, first, in an empty clone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.jax_cache

.PHONY: setup train test test-tpu test-gpu parity lint clean

setup: $(VENV)/.installed

$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --editable .[test]
	touch $@

$(VENV)/.parity: $(VENV)/.installed
	$(PIP_INSTALL) --editable .[test,parity]
	touch $@

$(VENV)/.tpu: $(VENV)/.installed
	$(PIP_INSTALL) --editable .[test,tpu]
	touch $@

$(VENV)/.cuda13: $(VENV)/.installed constraints-cuda13.txt
	$(PIP_INSTALL) --constraint constraints-cuda13.txt --editable .[test,cuda13]
	touch $@

train: setup
	$(BIN)/python -m dsmoe.train --config=experiments/tiny.py --workdir=runs/tiny

test: setup
	$(BIN)/python -m pytest -n 2 -m "not parity and not tpu and not gpu"

# The compilers of TPUs and of the H100, with neither at hand.
test-tpu: $(VENV)/.tpu
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n 2 -m tpu

test-gpu: $(VENV)/.cuda13
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n 2 -m gpu

# Compiled as users compile, where the other tests spend less on machine code.
parity: $(VENV)/.parity
	XLA_FLAGS= $(BIN)/python -m pytest -m parity

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .jax_cache build *.egg-info
