# `make test` and `make demo` install what they need into .venv first; a second call finds it there.

PYTHON ?= python3
PYTEST_ARGS ?= -n 2 --dist loadgroup

GPU_PYTHON ?= python3
GPU_OUT ?= gpu-check

BIN := .venv/bin
TORCH := $(shell grep '^torch==' constraints.txt)

.PHONY: test check pytest lint fmt mutants demo docs savings bench bench-gpu gpu-check clean

# lint, types and all tests; the type checker runs beside them
test: .venv/test.stamp
	$(MAKE) --no-print-directory -j 2 lint pytest

# lint, types and the tests that are not slow
check: .venv/test.stamp
	$(MAKE) --no-print-directory -j 2 lint pytest PYTEST_ARGS='$(PYTEST_ARGS) -m "not slow"'

pytest: .venv/test.stamp
	$(BIN)/pytest $(PYTEST_ARGS)

lint: .venv/test.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python

fmt: .venv/test.stamp
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# hand-made mistakes that the tests must find
mutants: .venv/test.stamp
	$(BIN)/python tests/mutants.py

demo: .venv/demo.stamp
	$(BIN)/growkern demo

# the site: README, the guides, a page per name, method and procedure; site/html/index.html
docs: .venv/docs.stamp
	$(BIN)/python -m bench.docs

# what growing saves, measured; goes on where it was killed
savings: .venv/bench.stamp
	$(BIN)/python -m bench.savings

bench: .venv/bench.stamp
	$(BIN)/python -m bench

bench-gpu: .venv/bench.stamp
	$(BIN)/python -m bench --gpu

# With the Python of a machine that has a GPU and no network: GPU_PYTHON has torch, triton, transformers, pytest, ...
gpu-check:
	$(GPU_PYTHON) tests/gpu_check.py $(GPU_OUT)

# torch first: pip then keeps the build it finds for this machine while it resolves the rest
.venv/%.stamp: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet '$(TORCH)' -c constraints.txt
	$(BIN)/python -m pip install --quiet -e '.[$*]' -c constraints.txt
	touch $@

clean:
	rm -rf .venv build dist growkern.egg-info .pytest_cache .ruff_cache .hypothesis growkern-demo gpu-check site
	find . -name __pycache__ -prune -exec rm -rf {} +
