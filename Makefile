# demo, test and check each bring the environment they need; nothing else has to be installed.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help demo test test-faults check proto clean redis-server peers

help:
	@echo "make demo    install into .venv, start a local cluster, send real chat requests, stop it"
	@echo "make test    unit and multi-process tests"
	@echo "make test-faults  every fault of the KV hand-off, 200 hand-offs each: about 10 minutes;"
	@echo "                  with BATON_LONG_FAULTS=1 also a minute without Redis"
	@echo "make check   format, lint, types, layers, generated code"
	@echo "make proto   regenerate wire/ from proto/"
	@echo "make peers   other routers for 'baton bench router --peers', each in its own environment"
	@echo "make clean   remove .venv and caches"

demo: .venv/installed
	$(BIN)/baton demo

test: .venv/installed-test redis-server
	$(BIN)/python -m pytest --ignore tests/faults

# Tests of the Redis registry start their own; the service that Debian's package brings stays off.
redis-server:
	@if ! command -v redis-server >/dev/null; then \
	    if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	        echo "installing redis-server"; \
	        apt-get update -qq && RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive \
	            apt-get install -qq -y --no-install-recommends redis-server >/dev/null; \
	    fi; \
	    command -v redis-server >/dev/null || \
	        echo "tests that need Redis will be skipped, or fail where CI is set:" \
	            "apt-get install redis-server, or on macOS: brew install redis"; \
	fi

test-faults: .venv/installed-test redis-server
	@$(MAKE) --no-print-directory -j 3 faults-of-1 faults-of-2 faults-of-3

faults-of-%: .venv/installed-test
	BATON_FAULT_REPEATS=200 BATON_FAULT_SHARD=$*/3 $(BIN)/python -m pytest tests/faults

check: .venv/installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/proto.py check

proto: .venv/installed-test
	$(BIN)/python tools/proto.py generate

peers: .venv/installed
	@$(BIN)/python -m benchmarks.router.peers.install

clean:
	rm -rf .venv .venv-peers .mypy_cache .ruff_cache .import_linter_cache .hypothesis *.egg-info

.venv/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "Baton needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 demo"; exit 1; }
	@$(PYTHON) -m venv .venv || \
	    { rm -rf .venv; echo "$(PYTHON) has no venv module: apt-get install python3-venv"; exit 1; }

.venv/installed: pyproject.toml constraints.txt | .venv/bin/pip
	@echo "installing pinned dependencies into .venv: about 2 minutes, once"
	$(PIP) --editable '.[demo,bench]'
	$(PIP) --no-deps nixl nixl-cu12
	@touch $@

.venv/installed-test: .venv/installed
	@echo "installing the test extras"
	$(PIP) --editable '.[test]'
	@touch $@
