# The commands of the project; `make` alone lists them. Needs python3 >= 3.11 (with venv) and make, nothing else.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
INSTALL := $(RUN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt

# Tests run in two processes; one thread each keeps them from fighting over two cores.
PYTEST := OMP_NUM_THREADS=1 $(RUN)/python -m pytest -n 2

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint bench clean

help: ## list these commands
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

demo: $(VENV)/.installed ## train a small OpenMythos on real text, sweep its depth, write runs/demo/report.html (6 minutes)
	$(RUN)/mythos train demo --fresh

test: lint ## lint, then run the tests (minutes on two cores)
	$(PYTEST) -m 'not slow'

test-slow: $(VENV)/.installed-dev ## run the long tests only
	$(PYTEST) -m slow

lint: $(VENV)/.installed-dev ## style, types and the direction of imports
	$(RUN)/ruff check
	$(RUN)/ruff format --check
	$(RUN)/mypy
	$(RUN)/lint-imports

bench: $(VENV)/.installed-dev ## compare with the original open-mythos, interleaved, same weights
	$(RUN)/python bench/vs_openmythos.py

clean: ## remove the environment and caches; runs/ stays
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache build dist *.egg-info
	find open_mythos tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("open_mythos needs Python >= 3.11, and \
	$(PYTHON) is " + sys.version.split()[0] + "; try make PYTHON=python3.12")'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo '$(PYTHON) lacks venv; on Debian and Ubuntu: apt-get install python3-venv' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml constraints.txt
	$(INSTALL) -e '.[plot]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.created pyproject.toml constraints.txt
	$(INSTALL) -e '.[dev]'
	@touch $@ $(VENV)/.installed
