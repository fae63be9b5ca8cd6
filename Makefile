# Two commands for a fresh machine: `make demo` and `make test`. Both set up their own environment in .venv.
PYTHON ?= python3.11
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed

.PHONY: demo test lint types layers unit test-slow bench zoo wheels clean

# torch is pinned for the development environment only: a version with a small CPU build. The package itself
# accepts any torch from 2.7.
$(STAMP): pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check --upgrade pip "setuptools<80" wheel
	$(BIN)/pip install -q --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install -q --disable-pip-version-check --no-build-isolation -e ".[cpu,compile,serve,dev]"
	touch $@

demo: $(STAMP)
	$(BIN)/offramp demo -o demo-artifact

test: lint types layers unit

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy reads source trees, not import hooks: give it the namespace as links.
types: $(STAMP)
	mkdir -p build/types/offramp
	for room in compiler passes runtime; do ln -sfn ../../../$$room build/types/offramp/$$room; done
	MYPYPATH=build/types $(BIN)/mypy -p offramp
	MYPYPATH=build/types $(BIN)/mypy benchmarks
	$(BIN)/mypy .ci/wheels.py

layers: $(STAMP)
	$(BIN)/lint-imports

# Two processes of one thread each: torch's threads would spin against each other's.
unit: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

# Real weights and long sweeps: reads ../shared/data where it is there, and says what it skips where not.
test-slow: $(STAMP)
	$(BIN)/pytest -m slow

bench: $(STAMP)
	$(BIN)/python -m benchmarks.cifar10_resnet --epochs 50
	$(BIN)/python -m benchmarks.single_file
	$(BIN)/python -m benchmarks.heads
	$(BIN)/python -m benchmarks.search_cost
	$(BIN)/python -m benchmarks.ablation
	$(BIN)/python -m benchmarks.recorded
	$(BIN)/python -m benchmarks.thresholds
	$(BIN)/python -m benchmarks.tuned
	$(BIN)/python -m benchmarks.precision
	$(BIN)/python -m benchmarks.speed
	$(BIN)/python -m benchmarks.footprint
	$(BIN)/python -m benchmarks.variants
	$(BIN)/python -m benchmarks.whole_compile
	$(BIN)/python -m benchmarks.serve
	$(BIN)/python -m benchmarks.cache_trace

# What is published: offramp, offramp-compile, offramp-serve.
wheels: $(STAMP)
	$(BIN)/python .ci/wheels.py dist

# Hundreds of models with random weights: its own environment, for it needs torchvision and timm, and hours. Stopped,
# it goes on where it was; docs/zoo.md is written of what is done.
ZOO = build/zoo-env
build/zoo-env/.installed: pyproject.toml
	$(PYTHON) -m venv $(ZOO)
	$(ZOO)/bin/pip install -q --disable-pip-version-check --upgrade pip "setuptools<80" wheel
	$(ZOO)/bin/pip install -q --disable-pip-version-check torch torchvision timm transformers
	$(ZOO)/bin/pip install -q --disable-pip-version-check --no-build-isolation -e ".[cpu,compile,dev]"
	touch $@

zoo: build/zoo-env/.installed
	OMP_NUM_THREADS=1 $(ZOO)/bin/python -m benchmarks.zoo

clean:
	rm -rf $(VENV) build dist *.egg-info demo-artifact demo-artifact.npz
