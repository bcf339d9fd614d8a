# make demo    the main job on the embedded digits, step by step
# make test    the whole suite          make check   ruff, pyright
# make bench   the benchmarks, quick    make clean   everything made here, gone
# VENV=path    use (and fill) another environment than .venv

VENV ?= .venv
PYTHON ?= python3
PY = $(VENV)/bin/python
RUN = $(PY) compress_classifier.py
DEMO = logs/demo
READY = $(VENV)/.ready-$(shell cat requirements.txt requirements-dev.txt | cksum | cut -d' ' -f1)

.PHONY: setup demo test test-slow check format bench clean

setup: $(READY)

$(READY): requirements.txt requirements-dev.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet -r requirements.txt -r requirements-dev.txt
	rm -f $(VENV)/.ready-*
	touch $@

test: setup
	$(PY) -m pytest -n 2 -m "not slow"

test-slow: setup
	$(PY) -m pytest -m slow

check: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --pythonpath $(PY)

format: setup
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: setup
	@for benchmark in benchmarks/*.py; do echo "== $$benchmark --quick"; $(PY) $$benchmark --quick || exit 1; done

clean:
	rm -rf .venv logs .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
