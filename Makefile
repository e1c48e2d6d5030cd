# Short names for the scripts of this repository. The scripts do the work; CI calls them, not make.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help test test-all lint format docs docs-serve quickstart nightly clean

# Words for the script behind a target: make test ARGS="tests/report -k page"
ARGS ?=
# tools/setup_venv.sh makes the environment on first use and prints its path.
ACTIVATE := venv=$$(bash tools/setup_venv.sh); export PATH="$$venv/bin:$$PATH"

help: ## List the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 16

test: ## Run the first tier of the tests (ARGS go to pytest)
	bash tests/run.sh $(ARGS)

test-all: ## Run every test that belongs to a commit
	bash tests/run.sh --all $(ARGS)

lint: ## Run ruff check, ruff format --check, codespell and mypy; change nothing
	$(ACTIVATE); ruff check .
	$(ACTIVATE); ruff format --check .
	$(ACTIVATE); codespell
	$(ACTIVATE); mypy

format: ## Sort imports, fix what ruff can fix, format
	$(ACTIVATE); ruff check --fix .
	$(ACTIVATE); ruff format .

docs: ## Build the site in build/site, strictly
	$(ACTIVATE); mkdocs build --strict --site-dir build/site

docs-serve: ## Show the site on this machine and rebuild it on changes
	$(ACTIVATE); mkdocs serve

quickstart: ## Train, convert and compare a small pair (ARGS are paths of text)
	bash examples/quickstart.sh $(ARGS)

nightly: ## Run the checks that take hours (ARGS choose stages)
	bash tests/nightly.sh $(ARGS)

clean: ## Remove the built site and the caches of tools; keep .venv, quickstart and runs
	rm -rf build/site .ruff_cache .mypy_cache .pytest_cache
