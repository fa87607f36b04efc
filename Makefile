# demo: see HG-DPO work (five to twelve minutes on two cores) · test: the tests · check: lint and types · world: make the embedded world again
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# On Linux the CPU build of torch (PyPI's brings gigabytes of CUDA); `make TORCH_INDEX=` takes PyPI's.
TORCH_INDEX ?= $(if $(filter Linux,$(shell uname -s)),https://download.pytorch.org/whl/cpu)

.PHONY: setup demo test test-slow check world clean

$(VENV)/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,figures,annotate]'
	touch $@

setup: $(VENV)/.ready

demo: setup
	$(BIN)/limner run recipes/figures/demo.yaml

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

test-slow: setup
	$(BIN)/python -m pytest -m slow

check: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

world: setup
	$(BIN)/limner figures make --config recipes/figures/world.yaml

clean:
	rm -rf runs $(VENV) .pytest_cache .mypy_cache .ruff_cache
