# make demo | test | test-all | lint; everything lives in .venv
PYTHON ?= python3
BIN := .venv/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-all lint schema record chaos clean

demo: .venv/installed
	$(BIN)/renderfarm run jobs/demo.yaml

# Two processes, each with its own Ray and its own tiny models; a wait that spins would take the other's core. What kills
# processes and counts on their time runs by itself afterwards.
PROCESSES ?= 2
TEST := OMP_NUM_THREADS=1 GOMP_SPINCOUNT=0 $(BIN)/python -m pytest
test: .venv/installed-dev .venv/azurite
	$(TEST) -n $(PROCESSES) --dist worksteal $(or $(PYTEST_OPTIONS),-m "not slow and not chaos")
	$(if $(PYTEST_OPTIONS),,$(TEST) -m "chaos and not slow")

# What is marked slow as well: the rest of each cross product, and what waits long
test-all: .venv/installed-dev .venv/azurite
	$(TEST) -n $(PROCESSES) --dist worksteal -m "not chaos"
	$(TEST) -m chaos

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# A hundred rounds of real kills; prints what was lost, twice or wrong (nothing), and what was rendered again
chaos: .venv/installed-dev
	$(BIN)/python tests/chaos_rounds.py $(CHAOS_OPTIONS)

# The JSON Schema that editors check job files with
schema: .venv/installed
	$(BIN)/renderfarm schema job > jobs/job.schema.json

# Which classes give diffusers' own pixels here, and with which versions
record: .venv/installed-dev
	$(BIN)/python -m pytest --record renderfarm/models/compared.json -k "own_pipeline or mixed_batch or alone or enlarges" \
	  tests/test_families.py tests/test_tasks.py tests/test_companions.py

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo 'renderfarm needs Python 3.11 or newer; name one: make demo PYTHON=python3.12'; exit 1; }
	@$(PYTHON) -m venv .venv \
	  || { rm -rf .venv; echo 'python3 -m venv failed; on Debian or Ubuntu: sudo apt install python3-venv'; exit 1; }

# torch first and by itself: its exact version, not the newest that a later requirement would allow
.venv/installed: .venv/bin/python pyproject.toml constraints.txt
	$(PIP_INSTALL) torch
	$(PIP_INSTALL) -e .
	@touch $@

.venv/installed-dev: .venv/installed
	$(PIP_INSTALL) -e '.[dev]'
	@touch $@

# Azure's own store on loopback, for the tests; without node they say that they skip it
AZURITE := azurite@3.37.0
.venv/azurite: .venv/bin/python
	@if command -v npm >/dev/null; then npm install --silent --no-audit --no-fund --prefix .venv/azurite $(AZURITE); touch $@; \
	  else echo 'npm is not installed: the tests on Azure are skipped'; fi

clean:
	rm -rf .venv out build *.egg-info
