# make train trains a small model; make test runs the tests. Both work in an empty clone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Modules are compiled when they are first imported; most of them never are.
PIP_INSTALL := $(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.jax_cache

.PHONY: setup train test test-slow test-tpu test-gpu test-on-gpu on-device parity lint clean

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
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not parity and not tpu and not gpu"

# Tests of minutes each, left out of `make test`. CI runs them too.
test-slow: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "slow and not parity and not tpu and not gpu"

# Kernels through the compilers of TPUs and of the H100. Neither device is needed.
test-tpu: $(VENV)/.tpu
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n 2 --dist worksteal -m tpu

test-gpu: $(VENV)/.cuda13
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n 2 -m gpu

# The values that the GPU kernels compute, on an attached Hopper GPU.
test-on-gpu: $(VENV)/.cuda13
	DSMOE_TEST_PLATFORM=cuda XLA_FLAGS= XLA_PYTHON_CLIENT_PREALLOCATE=false \
	  $(BIN)/python -m pytest -n 4 -m "hopper and not gpu" tests/pallas_kernels

# All there is to measure on an attached GPU, within 8 minutes, into runs/on_device.
on-device:
	scripts/on_device.sh

# With XLA's default options, as users compile; the other tests compile faster, slower code.
parity: $(VENV)/.parity
	XLA_FLAGS= $(BIN)/python -m pytest -n 2 --dist worksteal -m parity

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .jax_cache build *.egg-info
