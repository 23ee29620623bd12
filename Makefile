PYTHON ?= python3

run: .venv/installed
	.venv/bin/python train_sft.py
	.venv/bin/python train_dpo.py

test: .venv/installed
	.venv/bin/python -m pytest

lint: .venv/installed-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

test-peers: .venv/installed-peers
	.venv/bin/python -m pytest tests/test_gpt2.py tests/test_peers.py tests/test_properties.py

mutants: .venv/installed-peers
	.venv/bin/mutmut run
	.venv/bin/mutmut results
	.venv/bin/python experiments/mutants.py

RUNS ?= out

figures: .venv/installed-dev
	.venv/bin/python experiments/curves.py $(RUNS) --picture assets/curves.svg
	.venv/bin/python experiments/tokens.py $(firstword $(RUNS)) --picture assets/tokens.svg

tables: .venv/installed
	.venv/bin/python experiments/tables.py

.venv/installed: requirements.txt
	@command -v $(PYTHON) > /dev/null || { echo "$(PYTHON) is not installed: install Python 3.11 or newer"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "$(PYTHON) is too old: install Python 3.11 or newer, then make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -m venv .venv || { echo "Python's venv is missing: on Debian, apt install python3-venv"; exit 1; }
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

.venv/installed-peers: .venv/installed requirements-peers.txt
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-peers.txt
	@touch $@

.PHONY: run test lint test-peers mutants figures tables
