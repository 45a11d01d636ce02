# SPDX-License-Identifier: BSD-3-Clause
# make demo     four processes train on real data, synchronized and not
# make test     every test, on 1 to 4 processes
# make test-fake-gpu  a part of make test: the layer on CUDA tensors, on a device made of host memory
# make test-torch TORCH=2.11.0 PYTHON=python3.12   the tests on another torch and Python, in an environment of its own
# make sanitize the kernel tests on a build with gcc's address and undefined-behaviour sanitizers
# make dist     an sdist and a manylinux wheel in dist/, each checked in an empty environment
# make gpu      on a machine with an NVIDIA GPU: the tests with CUDA tensors, then the benchmark; needs no network
PYTHON ?= python3.11
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
BIN_MPICH := $(CURDIR)/$(VENV)-mpich/bin
INSTALL := -m pip install --quiet --disable-pip-version-check -c constraints.txt
# $(call quietly,ENVIRONMENT,SENTENCE,COMMAND): one line for the step; what pip says is kept, and shown where it fails.
quietly = @echo "$(2)"; $(3) >>$(1)/pip.log 2>&1 || { cat $(1)/pip.log; echo "FAILED: $(2)" >&2; exit 1; }
# $(call extras,ENVIRONMENT,NAMES): installs the packages of these extras without syncbn, which need not be built again.
READ := import sys, tomllib; extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]
READ += ; print(*[package for name in sys.argv[1:] for package in extras[name]], sep="\n")
extras = $(PYTHON) -c '$(READ)' $(2) >$(1)/extras.txt && $(1)/bin/python $(INSTALL) -r $(1)/extras.txt
export PATH := $(BIN):$(PATH)
export PYTHONUNBUFFERED := 1

.PHONY: demo test test-one test-mpi test-torchrun test-fake-gpu test-torch test-mpich sanitize gpu lint docs dist clean

demo: $(VENV)/demo-ready
	NPROC=4 launch/mpirun.sh examples/digits.py

test: test-one test-mpi test-torchrun test-fake-gpu

test-one: $(VENV)/ready
	timeout 2400 python -m pytest

test-mpi: $(VENV)/ready
	NPROC=2 timeout 1200 launch/mpirun.sh -m pytest --with-mpi tests/multiprocess
	NPROC=3 timeout 1200 launch/mpirun.sh -m pytest --with-mpi tests/multiprocess
	NPROC=4 timeout 1200 launch/mpirun.sh -m pytest --with-mpi tests/multiprocess

test-torchrun: $(VENV)/ready
	NPROC=2 timeout 1200 launch/torchrun.sh -m pytest tests/multiprocess

# CUDA tensors without a GPU: the kernels from their own source, pinned memory, gloo; see tests/fake_cuda. What compiles
# for minutes is left to the CPU.
FAKE := SYNCBN_TEST_DEVICE=fake-cuda timeout 600
SLOW := $(addprefix tests/multiprocess/test_,compile.py combinations.py)
GLOO := $(patsubst %,tests/multiprocess/test_%.py,late_verdict exactness ddp bad_input collectives masks groups world modes)
GLOO += tests/multiprocess/test_combinations.py::test_a_repeated_forward_goes_where_the_first_one_went
test-fake-gpu: $(VENV)/ready
	$(FAKE) python -m pytest $(patsubst %,tests/test_%.py,fake_cuda layer derivatives convert bench_gpu)
	NPROC=2 $(FAKE) launch/mpirun.sh -m pytest --with-mpi $(filter-out $(SLOW),$(wildcard tests/multiprocess/test_*.py))
	NPROC=2 $(FAKE) launch/torchrun.sh -m pytest $(GLOO)

# Not part of make test: this torch may bring gigabytes. Newest versions of the rest, not those of constraints.txt.
TORCH ?= 2.11.0
OTHER := $(VENV)-torch-$(TORCH)
test-torch:
	test -x $(OTHER)/bin/python || $(PYTHON) -m venv $(OTHER)
	$(OTHER)/bin/python -m pip install --quiet --disable-pip-version-check torch==$(TORCH)
	$(OTHER)/bin/python -m pip install --quiet --disable-pip-version-check -e ".[mpi,examples,test,docs,wrappers]" torch==$(TORCH)
	PATH=$(CURDIR)/$(OTHER)/bin:$$PATH timeout 1500 python -m pytest
	NPROC=2 PATH=$(CURDIR)/$(OTHER)/bin:$$PATH timeout 1200 launch/mpirun.sh -m pytest --with-mpi tests/multiprocess
	NPROC=2 PATH=$(CURDIR)/$(OTHER)/bin:$$PATH timeout 1200 launch/torchrun.sh -m pytest tests/multiprocess

# The other MPI wheel, in an environment of its own: one environment holds one MPI.
test-mpich: $(VENV)-mpich/ready
	NPROC=3 PATH=$(BIN_MPICH):$$PATH timeout 1200 launch/mpirun.sh -m pytest --with-mpi tests/multiprocess

sanitize: $(VENV)/ready
	timeout 900 tests/sanitize.sh

# With the machine's own Python, torch and CuPy.
gpu:
	launch/gpu.sh

lint: $(VENV)/ready
	ruff format --check .
	ruff check .
	mypy

docs: $(VENV)/ready
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict

# Only builds and checks; how a release is uploaded is for its maintainer.
dist: $(VENV)-dist/ready
	PYTHON=$(PYTHON) TOOLS=$(CURDIR)/$(VENV)-dist/bin tests/dist.sh

# What the demo needs. The CPU build of torch comes first: resolved by a range, torch brings gigabytes of CUDA packages.
DEMO := .[mpi,examples]
$(VENV)/demo-ready: constraints.txt pyproject.toml setup.py $(wildcard syncbn/kernels/host/*)
	@echo "Making $(VENV): what pip says goes to $(VENV)/pip.log"
	@$(PYTHON) -m venv $(VENV)
	@rm -f $(VENV)/pip.log
	$(call quietly,$(VENV),  torch (the CPU build: some 200 MB to load),$(BIN)/python $(INSTALL) torch)
	$(call quietly,$(VENV),  syncbn with MPI and compiled kernels; scikit-learn; matplotlib,$(BIN)/python $(INSTALL) -e "$(DEMO)")
	@touch $@

# The same environment, filled up with what the tests, the linters and the pages need.
$(VENV)/ready: $(VENV)/demo-ready
	$(call quietly,$(VENV),  tools of the tests,$(call extras,$(VENV),test wrappers))
	$(call quietly,$(VENV),  tools of the linters and the pages,$(call extras,$(VENV),docs lint))
	@touch $@

# Has no torch: the build of syncbn needs none.
$(VENV)-dist/ready: constraints.txt pyproject.toml
	@echo "Making $(VENV)-dist: build and auditwheel"
	@$(PYTHON) -m venv $(VENV)-dist
	@rm -f $(VENV)-dist/pip.log
	$(call quietly,$(VENV)-dist,  tools that build packages,$(call extras,$(VENV)-dist,dist))
	@touch $@

$(VENV)-mpich/ready: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)-mpich
	$(BIN_MPICH)/python $(INSTALL) torch
	$(BIN_MPICH)/python $(INSTALL) -e ".[test]" mpi4py mpich
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-mpich $(VENV)-dist out site build dist
