# Everything happens in a virtual environment, .venv, made from python3 (3.11 or newer) on the first run:
#     make demo        pictures with and without DeepCache; look at outputs/demo/contact_sheet.png
#     make app         methods in the browser, beside the plain pictures
#     make test        the tests, without the slow ones
#     make test-all    all tests
#     make lint        style and types
#     make bench       measure all claims again and record them; KEY=deepcache measures one method
#     make claim       measure one recorded claim again, chosen by the commit; COMMIT=hash where git cannot tell

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CHECKED := diffusers_ext tests benchmarks examples
KEY ?= --all
COMMIT ?=

.PHONY: help demo app test test-all lint bench claim
.DEFAULT_GOAL := help

help:
	@sed -n 's/^#  *make/make/p' Makefile

# torch comes first and alone, so that its version is the pinned one whatever the others ask for.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.version_info >= (3, 11) or sys.exit(f"Python 3.11 or newer is needed; $(PYTHON) is {v}. Try: make PYTHON=python3.12")'
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt torch
	$(BIN)/python -m pip install -c constraints.txt -e '.[test]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	touch $@

$(VENV)/.installed-app: $(VENV)/.installed
	$(BIN)/python -m pip install -c constraints.txt -e '.[app]'
	touch $@

$(VENV)/.installed-bench: $(VENV)/.installed
	$(BIN)/python -m pip install -c constraints.txt -e '.[bench]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/diffusers-ext demo --output outputs/demo

app: $(VENV)/.installed-app
	$(BIN)/diffusers-ext app

# A process a core, up to four, since each holds its own models; a file stays in one of them.
PARALLEL := -n auto --maxprocesses 4 --dist loadfile

test: $(VENV)/.installed
	$(BIN)/python -m pytest $(PARALLEL) -m 'not slow'

test-all: $(VENV)/.installed
	$(BIN)/python -m pytest $(PARALLEL)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)
	$(BIN)/mypy

bench: $(VENV)/.installed-bench
	$(BIN)/diffusers-ext bench $(KEY)

claim: $(VENV)/.installed
	$(BIN)/diffusers-ext bench --ci $(if $(COMMIT),--commit $(COMMIT))
