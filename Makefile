# Everything sets itself up: `make demo` and `make test` create the virtual environment they need and do nothing
# where nothing changed. Variables: PYTHON (3.11 or 3.12), VENV, DALI (cuda13 or cuda12), WORKSPACE (of the demo).
PYTHON ?= python3
VENV ?= .venv
DALI ?= cuda13
WORKSPACE ?= demo
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test test-faults check format setup native clean

demo: $(VENV)/.runtime
	@$(BIN)/svitt demo --workspace $(WORKSPACE)

# A test process that dies ends the run and is named: started anew, xdist 3.8 may wait for ever for work already done.
test: check
	$(BIN)/python -m pytest -n 2 --dist loadfile --max-worker-restart 0

# Whole runs that are killed, stopped and cut off; about half an hour.
test-faults: $(VENV)/.dev
	$(BIN)/python -m pytest -m faults -s

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

setup: $(VENV)/.runtime

# DeepSpeed's optimizer on the CPU, for offload_optimizer; otherwise built by the first run that needs it.
native: $(VENV)/.runtime
	@$(BIN)/python -m infra.native_ops

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v[:2] <= (3, 12) else f"{sys.executable} is Python {v[0]}.{v[1]}; this project runs on 3.11 and 3.12: make PYTHON=python3.12 ...")'
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "The Python module venv is missing: install it (Debian, Ubuntu: apt-get install python3-venv), then run make again."; exit 1; }
	$(PYTHON) -m venv $(VENV)

# A stamp file per set of packages: newer than what it was made from means nothing is to be done.
$(VENV)/.runtime: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing the pinned packages into $(VENV) (about 3 GB, once) ..."
	$(PIP) install -qq --constraint constraints.txt --editable '.[$(DALI)]'
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(PIP) install -qq --constraint constraints.txt --editable '.[$(DALI),dev]'
	@touch $@

clean:
	rm -rf $(VENV) $(WORKSPACE) *.egg-info
