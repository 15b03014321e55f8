# Each target does all its own set-up into .venv: only Python 3.11+ and make are needed.
PYTHON ?= python3
# Further packages to install with the tests, e.g. `make test PEERS=torch` for the comparisons with PyTorch.
PEERS ?=
RUN := .venv/bin/python

.PHONY: demo test clean

demo: .venv/installed
	$(RUN) -m dilformer_jax.demo --output runs/demo

test: .venv/installed-for-tests
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -m pytest

.venv/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --editable '.[plot]'
	touch $@

.venv/installed-for-tests: .venv/installed
	$(RUN) -m pip install --quiet --editable '.[plot,test,dev]' $(PEERS)
	touch $@

clean:
	rm -rf .venv runs build *.egg-info
