# `make test` and `make demo` install what they need into .venv first; a second call finds it there.

PYTHON ?= python3
PYTEST_ARGS ?= -n 2 --dist loadgroup

BIN := .venv/bin
TORCH := $(shell grep '^torch==' constraints.txt)

.PHONY: test lint fmt demo clean

test: lint
	$(BIN)/pytest $(PYTEST_ARGS)

lint: .venv/test.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python

fmt: .venv/test.stamp
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

demo: .venv/demo.stamp
	$(BIN)/growkern demo

# torch first: pip then keeps the build it finds for this machine while it resolves the rest
.venv/%.stamp: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet '$(TORCH)' -c constraints.txt
	$(BIN)/python -m pip install --quiet -e '.[$*]' -c constraints.txt
	touch $@

clean:
	rm -rf .venv build dist growkern.egg-info .pytest_cache .ruff_cache .hypothesis growkern-demo
	find . -name __pycache__ -prune -exec rm -rf {} +
