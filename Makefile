# Every target makes its own virtual environment first. Needed: make, bash, and python3 (3.11 or newer) with its venv module.
PYTHON ?= python3
VENV ?= .venv
# What pip is asked for as torch, and where besides its usual index, e.g. the address of PyTorch's CPU packages:
# a machine without a GPU needs no gigabytes of CUDA. Where pip is offered both builds, it takes the CPU one by itself.
TORCH_INSTALL ?= torch==2.13.0
TORCH_INDEX ?=
# Processes that share the tests, one more than CI has cores, since some tests wait for what hangs; a GPU is nobody's to share, its times least of all.
JOBS ?= $(if $(wildcard /proc/driver/nvidia/version),0,3)
# The oldest and the newest Triton that a rendered text must compile with.
TRITONS ?= 3.6.0 3.9.0
# make fuzz SEEDS=first:count, or FUZZ_SECONDS=600 for as many as fit
SEEDS ?= 1000:1000
FUZZ_SECONDS ?=

PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
export PYTHON TORCH_INSTALL TORCH_INDEX
# The model of the quickstart lies in a package: nothing is to be asked of a hub.
export HF_HUB_OFFLINE := 1

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-long check lint fix golden gpu wheel-test compile-goldens compile-calls compile-free-form compile-options proof fuzz torture clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' Makefile

$(STAMP): pyproject.toml constraints.txt hatch_build.py scripts/setup_venv.sh
	@scripts/setup_venv.sh "$(VENV)"
	@touch "$@"

quickstart: $(STAMP) ## the whole chain on a real model: render, compile, check, tune, store, dispatch, export
	@mkdir -p .cache
	$(VENV)/bin/flashgen quickstart --output .cache

test: $(STAMP) ## all tests but those of test-long, of whose kinds it has samples; what needs a GPU is skipped where there is none
	$(PY) -m pytest -q -rs --durations=10 -m "not long" -n $(JOBS) --dist worksteal

test-long: $(STAMP) ## the tests that `make test` leaves out: the rest of long tables of simulations and compilations, and a few of a minute each
	$(PY) -m pytest -q -rs --durations=10 -m "long" -n $(JOBS) --dist worksteal

check: lint ## format, lint, strict types, and the fast tests
	$(PY) -m pytest -q -m "not slow and not gpu" -n $(JOBS) --dist worksteal tests/unit tests/golden

lint: $(STAMP) ## format, lint and strict types alone
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

fix: $(STAMP) ## format, and mend what can be mended
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

golden: $(STAMP) ## render the golden files anew; then read the diff
	$(PY) -m pytest -q tests/golden --update-golden

gpu: $(STAMP) ## the tests that need a GPU
	$(PY) -m pytest -q -m gpu -rs

wheel-test: $(STAMP) ## build sdist and wheel, install outside the checkout, render a kernel there and read a seed
	$(PY) scripts/wheel_test.py

compile-goldens: $(STAMP) ## compile every golden file with the oldest and the newest Triton
	@for version in $(TRITONS); do scripts/with_triton.sh "$(PY)" $$version tests/compile_goldens.py || exit 1; done

compile-calls: $(STAMP) ## compile what calls with every kind of operand ask for, with the oldest and the newest Triton
	@for version in $(TRITONS); do scripts/with_triton.sh "$(PY)" $$version tests/compile_calls.py || exit 1; done

compile-free-form: $(STAMP) ## blocks without a mask in the Hopper backward of free-form masks beside the plain kernel's, with both
	@for version in $(TRITONS); do scripts/with_triton.sh "$(PY)" $$version tests/compile_free_form.py || exit 1; done

compile-options: $(STAMP) ## the Hopper backward's default of every option and every two: spills in its loop, with both
	@for version in $(TRITONS); do scripts/with_triton.sh "$(PY)" $$version tests/compile_options.py || exit 1; done

proof: $(STAMP) ## the default Hopper kernels by the oldest and the newest Triton: no spill, no serialised product
	@for version in $(TRITONS); do scripts/with_triton.sh "$(PY)" $$version -m flashgen show proof --lse || exit 1; done

fuzz: $(STAMP) ## random calls over every option; SEEDS=first:count or FUZZ_SECONDS=600
	$(PY) tests/fuzz/fuzz.py $(if $(FUZZ_SECONDS),--seconds $(FUZZ_SECONDS),--seeds $(SEEDS))

torture: fuzz compile-goldens compile-calls compile-free-form compile-options ## what is too long for CI: many random problems, every broken template and backend
	$(PY) tests/mutation/mutate.py
	$(PY) tests/mutation/backends.py
	$(PY) tests/simulate/study.py
	$(PY) tests/simulate/option_study.py
	@for version in $(TRITONS); do scripts/with_triton.sh "$(PY)" $$version -m pytest -q tests/simulate/test_api.py || exit 1; done
	@for version in $(TRITONS); do scripts/with_triton.sh "$(PY)" $$version tests/unit/free_form_facts.py || exit 1; done

clean: ## remove what make made
	rm -rf "$(VENV)" .cache dist build
