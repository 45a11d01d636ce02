# SPDX-License-Identifier: BSD-3-Clause
# make demo     four processes train on real data, synchronized and not
# make test     every claim of the core, on 1 to 4 processes, in minutes
# make test-all that, and all other tests: programs, compilers, MPICH, CUDA tensors on a device made of host memory
# make test-torch TORCH=2.11.0 PYTHON=python3.12   the tests on another torch and Python, in an environment of its own
# make sanitize the kernel tests on a build with gcc's address and undefined-behaviour sanitizers
# make gpu      on a machine with an NVIDIA GPU: the tests with CUDA tensors, then the benchmark; needs no network
PYTHON ?= python3.11
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
BIN_MPICH := $(CURDIR)/$(VENV)-mpich/bin
INSTALL := -m pip install --quiet --disable-pip-version-check -c constraints.txt
export PATH := $(BIN):$(PATH)
export PYTHONUNBUFFERED := 1

.PHONY: demo test test-all test-torch sanitize gpu lint docs clean

demo: $(VENV)/ready
	NPROC=4 launch/mpirun.sh examples/digits.py

test: $(VENV)/ready
	tests/run.sh quick

test-all: test $(VENV)-mpich/ready
	BIN_MPICH=$(BIN_MPICH) tests/run.sh rest

# Not part of make test: this torch may bring gigabytes. Newest versions of the rest, not those of constraints.txt.
TORCH ?= 2.11.0
OTHER := $(VENV)-torch-$(TORCH)
test-torch:
	test -x $(OTHER)/bin/python || $(PYTHON) -m venv $(OTHER)
	$(OTHER)/bin/python -m pip install --quiet --disable-pip-version-check torch==$(TORCH)
	$(OTHER)/bin/python -m pip install --quiet --disable-pip-version-check -e ".[mpi,examples,test,docs,wrappers]" torch==$(TORCH)
	PATH=$(CURDIR)/$(OTHER)/bin:$$PATH tests/run.sh quick programs compiled

sanitize: $(VENV)/ready
	timeout 900 tests/sanitize.sh

# With the machine's own Python, torch and CuPy.
gpu:
	launch/gpu.sh

lint: $(VENV)/ready
	ruff format --check .
	ruff check .
	mypy
	lint-imports

docs: $(VENV)/ready
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict

# The CPU build of torch comes first: resolved by a range, torch brings gigabytes of CUDA packages.
$(VENV)/ready: constraints.txt pyproject.toml setup.py $(wildcard syncbn/kernels/host/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(INSTALL) torch
	$(BIN)/python $(INSTALL) -e ".[mpi,examples,test,wrappers,docs,lint]"
	touch $@

$(VENV)-mpich/ready: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)-mpich
	$(BIN_MPICH)/python $(INSTALL) torch
	$(BIN_MPICH)/python $(INSTALL) -e ".[test]" mpi4py mpich
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-mpich out site build dist
