# Every target works on a fresh machine that has Python 3.10+ and make. ARGS is passed on: make serve ARGS="--port 9000".
PYTHON ?= python3
VENV := .venv
ARGS ?=

# Worker threads that spin while they wait starve each other on small machines.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help serve test lint types check docs bench chaos soak overload clean venv venv-dev
.DEFAULT_GOAL := help

help:  ## show the targets
	@grep -E '^[a-z][a-z-]*:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/ ##/' | awk -F ' ## *' '{printf "  make %-10s %s\n", $$1, $$2}'

venv:  ## create .venv and install (nothing is done when it is up to date)
	@$(PYTHON) tools/bootstrap.py

venv-dev:  ## the same with the tools for tests
	@$(PYTHON) tools/bootstrap.py --extra dev

serve: venv  ## start the server on 127.0.0.1:8000
	@$(VENV)/bin/python -m server $(ARGS)

# All tests run in parts beside each other, with so many processes each (tools/run_tests.py); some run in one process.
JOBS ?= 2
ifeq ($(strip $(ARGS)),)
test: venv-dev  ## run all tests, or some: make test ARGS="tests/server -k keys"
	$(VENV)/bin/python tools/run_tests.py --jobs $(JOBS)
else
test: venv-dev
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest $(ARGS)
endif

lint: venv-dev  ## ruff and the import rules
	$(VENV)/bin/ruff check spectral server tools tests bench
	$(VENV)/bin/lint-imports

types: venv-dev  ## mypy
	$(VENV)/bin/mypy $(ARGS)

docs: venv-dev  ## build the documentation site into site/
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict $(ARGS)

bench: venv-dev  ## measure the server's speed beside plain generation (bench/README.md lists all figures)
	OMP_NUM_THREADS=1 $(VENV)/bin/python bench/server_speed.py $(ARGS)

chaos: venv-dev  ## kill workers under load and check every promise: ARGS="--minutes 30 --json FILE" (--help lists all)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m tools.faults.chaos $(ARGS)

soak: venv-dev  ## mixed load with churn for ARGS="--minutes 120", leaks as figures
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m tools.faults.soak $(ARGS)

overload: venv-dev  ## goodput at up to four times the sustainable rate, and a light key beside a heavy one
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m tools.faults.overload $(ARGS)

check: lint types test  ## lint, types and tests

clean:  ## remove the environment and everything built
	rm -rf $(VENV) build dist site .ci/out .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: fuzz audit sbom
fuzz: venv-dev  ## random and malicious inputs for every reader: make fuzz ARGS="--inputs 1000000 --seed 7"
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m tests.fuzz $(ARGS)

audit: venv-dev  ## look the installed packages up among known weaknesses
	$(VENV)/bin/python tools/supply_chain.py audit $(ARGS)

sbom: venv-dev  ## write a bill of materials (CycloneDX): make sbom ARGS="--output sbom.json"
	$(VENV)/bin/python tools/supply_chain.py sbom $(ARGS)
