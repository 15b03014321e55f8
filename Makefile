# Each target does all its own set-up into .venv: only Python 3.11+ and make are needed.
PYTHON ?= python3
# Further packages to install with the tests, e.g. `make test PEERS=torch` for the comparisons with PyTorch.
PEERS ?=
# Processes that share the tests: nearly all of the time is a compiler's, which uses one core.
WORKERS ?= 2
RUN := .venv/bin/python
# On Linux the large arrays of a training step come in huge pages then; elsewhere it means nothing.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: demo test clean

# Trains on the built-in phantom brains, scores pairs it has not seen, registers one of them; stopped, it goes on.
demo: .venv/installed
	$(RUN) -m dilformer_jax.train --config configs/demo.py --workdir runs/demo
	$(RUN) -m dilformer_jax.evaluate --workdir runs/demo
	$(RUN) -m dilformer_jax.register --workdir runs/demo --report --output runs/demo/registration \
		--fixed runs/phantoms/phantom_024_t1.nii.gz --fixed-labels runs/phantoms/phantom_024_seg.nii.gz \
		--moving runs/phantoms/phantom_028_t1.nii.gz --moving-labels runs/phantoms/phantom_028_seg.nii.gz
	@echo
	@echo "Reports with pictures, to open in a browser:"
	@echo "  $(CURDIR)/runs/demo/evaluation/report.html    30 pairs of phantoms that the network has not seen"
	@echo "  $(CURDIR)/runs/demo/registration/report.html  one of these pairs"
	@echo "Training curves: $(CURDIR)/runs/demo/figures/training.png"

test: .venv/installed-for-tests
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

.venv/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --editable '.[plot]'
	touch $@

.venv/installed-for-tests: .venv/installed
	$(RUN) -m pip install --quiet --editable '.[plot,test,dev]' $(PEERS)
	touch $@

clean:
	rm -rf .venv runs build *.egg-info
