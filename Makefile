# Every target sets up its own environment; on a fresh machine `make demo` or `make test` is all it takes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: venv demo test check evidence clean

venv: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: venv
	$(BIN)/fedquilt simulate code --out runs/demo --resume

test: check
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

check: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

evidence: venv
	$(BIN)/fedquilt sweep evidence --seeds 5 --out runs/evidence

clean:
	rm -rf $(VENV)
