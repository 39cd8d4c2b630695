# Two commands set up everything: `make toy` runs the main job on this machine, `make test` the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SHARDS := shards/toy
export OMP_NUM_THREADS ?= 1

.PHONY: toy learn test lint clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

$(SHARDS)/tokenizer.json: | $(VENV)/installed
	$(BIN)/python launch/make_shards.py $(SHARDS)

# The main job at toy size: stage 2 under pipeline and expert parallelism on four ranks.
toy: $(VENV)/installed $(SHARDS)/tokenizer.json
	$(BIN)/torchrun --nproc-per-node 4 launch/pretrain.py +recipe=stage2 scale=toy \
		parallel.pp=2 parallel.ep=2 run.dir=runs/toy optim.lr=1e-3

# Stage 1 from scratch on the digit tasks, then exact match on held-out scans and a picture of the curve.
learn: $(VENV)/installed $(SHARDS)/tokenizer.json
	PATH="$(CURDIR)/$(BIN):$$PATH" sh launch/learn.sh $(SHARDS) runs/learn

test: $(VENV)/installed
	$(BIN)/python -m ruff check . && $(BIN)/python -m ruff format --check .
	$(BIN)/python -m pytest

lint: $(VENV)/installed
	$(BIN)/python -m ruff check --fix . && $(BIN)/python -m ruff format .

clean:
	rm -rf $(VENV) shards runs *.egg-info
