# SPDX-License-Identifier: BSD-3-Clause
# make demo     four processes train on real data, synchronized and not
# make test     every claim of the core, on 1 to 4 processes, in minutes
# make test-all that, and all other tests: programs, compilers, MPICH, model libraries, CUDA tensors on a device made of
#               host memory
# make test-hosts    the tests on several hosts made of network namespaces; as root, on Linux
# make test-slurm       jobs in a Slurm of this machine; needs root, and apt-get install slurm-wlm munge libpmix-dev
# make test-torch TORCH=2.11.0 PYTHON=python3.12   the tests on another torch and Python, in an environment of its own
# make sanitize the kernel tests on a build with gcc's address and undefined-behaviour sanitizers
# make dist     an sdist and a manylinux wheel in dist/, each checked in an empty environment
# make gpu      on a machine with an NVIDIA GPU: tests and benchmarks in five parts of 3 minutes; needs no network
# make pictures the pictures of the pages, from measurements that lie in benchmarks/pictures/results
# make scale    what synchronising costs on up to 1,024 ranks, simulated: docs/clusters/scale.md; needs SimGrid, some minutes of one core
PYTHON ?= python3.11
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
BIN_MPICH := $(CURDIR)/$(VENV)-mpich/bin
BIN_ZOO := $(CURDIR)/$(VENV)-zoo/bin
INSTALL := -m pip install --quiet --disable-pip-version-check -c constraints.txt
# $(call quietly,ENVIRONMENT,SENTENCE,COMMAND): one line for the step; what pip says is kept, and shown where it fails.
quietly = @echo "$(2)"; $(3) >>$(1)/pip.log 2>&1 || { cat $(1)/pip.log; echo "FAILED: $(2)" >&2; exit 1; }
# $(call extras,ENVIRONMENT,NAMES): installs the packages of these extras without syncbn, which need not be built again.
READ := import sys, tomllib; extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]
READ += ; print(*[package for name in sys.argv[1:] for package in extras[name]], sep="\n")
extras = $(PYTHON) -c '$(READ)' $(2) >$(1)/extras.txt && $(1)/bin/python $(INSTALL) -r $(1)/extras.txt
export PATH := $(BIN):$(PATH)
export PYTHONUNBUFFERED := 1

.PHONY: demo test test-all test-hosts test-slurm test-torch sanitize gpu pictures scale simgrid lint docs dist clean

demo: $(VENV)/demo-ready
	NPROC=4 launch/mpirun.sh examples/digits.py

test: $(VENV)/ready
	tests/run.sh quick

# Part of test-all. Several hosts made of network namespaces: needs root and iproute2, and skips with the reason without.
test-hosts: $(VENV)/ready
	tests/run.sh hosts

test-all: test $(VENV)-mpich/ready $(VENV)-zoo/ready
	BIN_MPICH=$(BIN_MPICH) BIN_ZOO=$(BIN_ZOO) tests/run.sh rest

test-slurm: $(VENV)/ready
	tests/run.sh slurm

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

# With the machine's own Python, torch and CuPy. Some of the parts: launch/gpu.sh contact bench
gpu:
	launch/gpu.sh

pictures: $(VENV)/demo-ready
	python -m benchmarks.pictures

# All ranks that the page has: make scale SCALE="--ranks 4096"
SCALE ?= --ranks 1024
scale: simgrid $(VENV)/demo-ready
	python -m benchmarks.scale $(SCALE)

simgrid:
	@{ command -v smpicc && command -v smpirun; } >/dev/null || \
		{ echo "make scale needs SimGrid: apt-get install -y libsimgrid-dev (Debian, Ubuntu; 190 MB)" >&2; exit 1; }

lint: $(VENV)/ready
	ruff format --check .
	ruff check .
	mypy
	lint-imports

docs: $(VENV)/ready
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict

# Only builds and checks; how a release is uploaded is for its maintainer.
dist: $(VENV)-dist/ready
	PYTHON=$(PYTHON) TOOLS=$(CURDIR)/$(VENV)-dist/bin tests/dist.sh

# What the demo needs. The CPU build of torch comes first: resolved by a range, torch brings gigabytes of CUDA packages.
DEMO := .[mpi,examples]
$(VENV)/demo-ready: constraints.txt pyproject.toml setup.py $(wildcard syncbn/kernels/host/*pp syncbn/transports/*pp)
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
	@echo "Making $(VENV)-mpich: one environment holds one MPI"
	@$(PYTHON) -m venv $(VENV)-mpich
	@rm -f $(VENV)-mpich/pip.log
	$(call quietly,$(VENV)-mpich,  torch,$(BIN_MPICH)/python $(INSTALL) torch)
	$(call quietly,$(VENV)-mpich,  syncbn with MPICH and tools of the tests,$(BIN_MPICH)/python $(INSTALL) -e ".[test]" mpi4py mpich)
	@touch $@

# Sees the packages of $(VENV) and adds to them. Without dependencies: ultralytics asks for an OpenCV that needs a display,
# torchvision for a torch with CUDA, and polars, of 170 MB, is for tables of results. What is needed stands in ZOO.
ZOO := kornia_rs opencv-python-headless ultralytics-thop xxhash
$(VENV)-zoo/ready: $(VENV)/ready
	@echo "Making $(VENV)-zoo: model libraries"
	@$(PYTHON) -m venv $(VENV)-zoo
	@rm -f $(VENV)-zoo/pip.log
	@echo "import site; site.addsitedir('$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
		>$$($(BIN_ZOO)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/shared.pth
	$(call quietly,$(VENV)-zoo,  timm torchvision MONAI PyG ultralytics and others,$(call extras,$(VENV)-zoo,zoo) --no-deps $(ZOO))
	@touch $@

clean:
	rm -rf $(VENV) $(VENV)-mpich $(VENV)-zoo $(VENV)-dist out site build dist
