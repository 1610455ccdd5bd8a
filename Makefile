# Every command of the project. `make` alone lists them.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
READY  := $(VENV)/.ready
AGENT  := $(VENV)/mini/.ready
DOCS   := $(VENV)/.ready-docs

.DEFAULT_GOAL := help
.PHONY: sandbox browser test-eval help setup agent train export check sync notebooks test test-notebooks test-docs lint docs docs-serve bench clean

help:  ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

$(READY): constraints.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed, {sys.executable} is {sys.version.split()[0]}; run make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(READY)

# An agent for ate-bench, in an environment of its own.
$(AGENT): tests/ate_bench/mini.txt $(READY)
	$(PY) -m venv $(VENV)/mini
	$(VENV)/mini/bin/python -m pip install -q --disable-pip-version-check --no-deps -r tests/ate_bench/mini.txt
	@touch $(AGENT)

# What builds the site and looks at it.
$(DOCS): $(READY)
	$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $(DOCS)

setup: $(READY)  ## create .venv with the pinned packages

agent: $(AGENT)  ## install mini-swe-agent, which the tests of ate-bench let work

train: $(READY)  ## train a small MoE on the Python standard library's source text
	$(VENV)/bin/pithtrain train configs/tiny.toml

export: $(READY)  ## notebooks -> modules (FORCE=1 throws hand edits of modules away)
	@$(PY) tools/literate.py export $(if $(FORCE),--force)

check: $(READY)  ## fail when a module is not what its notebook exports
	@$(PY) tools/literate.py check

sync: $(READY)  ## hand edits of modules -> notebooks
	@$(PY) tools/literate.py sync

notebooks: $(READY)  ## write the .ipynb twin of every notebook
	@$(PY) tools/literate.py notebooks

lint: $(READY)  ## ruff over notebooks, tests and tools
	@$(PY) -m ruff check nbs tests tools && $(PY) -m ruff format --check nbs tests tools

# Two workers on two cores: threads that outnumber the cores wait for one another.
test test-notebooks: export OMP_NUM_THREADS = 1

test-notebooks: notebooks  ## run every notebook, as a script and under nbdev's runner
	@$(PY) -m pytest tests/notebooks -n 2
	@$(VENV)/bin/nbdev_test --path nbs --n_workers 2

docs: $(DOCS)  ## run the notebooks and build the site, docs/_build/html
	@$(PY) tools/docs.py

docs-serve: docs  ## build the site and show it on http://localhost:8000
	@$(PY) -m http.server --bind 127.0.0.1 --directory docs/_build/html 8000

# The system's own chromium, since a browser that Playwright brings is not a package.
browser:
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; \
	then apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends chromium; \
	else echo 'test-docs needs a browser: install chromium (Debian: sudo apt-get install chromium)' >&2; exit 1; fi

test-docs: browser docs  ## build the site and look at every page in a headless chromium
	@$(PY) -m pytest tests/docs -n 2

# Agents are confined by bubblewrap.
sandbox:
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! command -v bwrap >/dev/null; \
	then apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends bubblewrap; fi || true
	@bwrap --unshare-all --ro-bind / / true 2>/dev/null || \
	echo 'bubblewrap is not installed, or not allowed here: the tests of the sandbox are skipped' >&2

test: check lint sandbox $(AGENT)  ## everything that needs no GPU
	@$(PY) -m pytest tests --ignore=tests/notebooks --ignore=tests/docs -n 2 -vv --durations=12
	@$(MAKE) --no-print-directory test-notebooks

test-eval: $(READY)  ## install the extra eval (640 MB); let the evaluation harness itself ask a model
	@$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[eval]'
	@$(PY) -m pytest tests/test_evaluate.py -k harness -n 0 -rs

clean:  ## remove what can be made again (not .venv, not runs/)
	rm -rf build dist *.egg-info docs/_build docs/.jupyter_cache .pytest_cache .ruff_cache
	find nbs -name '*.ipynb' -delete
