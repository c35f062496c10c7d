# One entry for every habit. `make` alone lists them. The tools come with `pip install -e '.[test]'`.
PYTHON ?= $(if $(wildcard .venv/bin/python),.venv/bin/python,python3)
BIN := $(dir $(shell command -v $(PYTHON)))

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

lint:  ## ruff, formatting and import contracts
	$(BIN)ruff check . && $(BIN)ruff format --check . && $(BIN)lint-imports

types:  ## mypy --strict
	$(BIN)mypy

test:  ## the test command of the README
	$(BIN)pytest

again:  ## rule tests over PostgreSQL, real fail-overs
	$(BIN)pytest -m again

campaigns:  ## crash suite, model, simulation, at length
	$(PYTHON) -m tests.faults
	$(PYTHON) -m tests.model
	$(PYTHON) -m tests.simulation --seeds 2000

docs:  ## build the site (needs the extra `docs`)
	$(BIN)mkdocs build --strict

ci:  ## what must pass before a change lands
	bash .ci/run

.PHONY: help lint types test again campaigns docs ci
