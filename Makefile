# Every target sets up what it needs: .venv is made on first use and again when its dependencies change.
PYTHON ?= python3
WORKERS ?= 2
ARGS ?=

VENV := .venv
LOWEST := .venv-lowest
RUN := $(VENV)/bin/python -m
STAMP := $(VENV)/.installed

# A processor without AVX-512, VNNI and AMX, for torch, oneDNN, FBGEMM and MKL; tests/inference/test_mask.py holds them to it.
# ONNX Runtime heeds none of it, so its own tests are left out.
MASK := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 DNNL_MAX_CPU_ISA=AVX2 \
  FBGEMM_ENABLE_INSTRUCTIONS=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
NUMERIC := $(addprefix tests/,functional backbones heads inference models pipelines/test_classifier.py \
  pipelines/test_classifier_properties.py training/test_states.py training/test_token_states.py training/test_policy.py \
  training/test_token_objectives.py evaluation/test_evaluation.py \
  evaluation/test_generation_evaluation.py)

# What tests run outside Python; without npm they are skipped.
NODE_STAMP := $(if $(shell command -v npm),tests/js/node_modules/.installed)

# The requirements of the extra `docs`, by themselves: to build this package once more for them takes longer than the site.
DOCS = $(shell sed -n 's/^docs = \[\(.*\)\]$$/\1/p' pyproject.toml | tr -d ,)

.DEFAULT_GOAL := help
.PHONY: help install demo test test-masked test-lowest check format dist docs

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo '  PYTHON=python3.12 picks the interpreter of a new .venv, WORKERS=4 the test processes, ARGS="-k exits" goes to pytest'

install: $(STAMP) ## make .venv with the package (editable) and all it needs
	@echo 'Ready: $(VENV)/bin/consistentee --help'

demo: $(STAMP) ## train, evaluate and try a small model: a few minutes on 2 cores, no model hub
	@$(VENV)/bin/python examples/demo.py

test: $(STAMP) $(NODE_STAMP) ## run the tests; those of exported graphs in Node and in a browser where these are
	@$(RUN) pytest -q -n $(WORKERS) --dist worksteal $(ARGS)

test-masked: $(STAMP) ## run the numeric tests as on a processor with AVX2 and no more
	@$(MASK) $(RUN) pytest -q -n $(WORKERS) --dist worksteal --ignore-glob='tests/inference/test_onnx*' --ignore=tests/models/test_card.py $(ARGS) $(NUMERIC)

test-lowest: $(LOWEST)/.installed ## run the quick tests with the lowest versions of all dependencies (Python 3.10 to 3.12)
	@$(LOWEST)/bin/python -m pytest -q -n $(WORKERS) --dist worksteal -m 'not slow and not network' $(ARGS)

check: $(STAMP) ## formatting, lint and types
	@$(RUN) ruff format --check --quiet .
	@$(RUN) ruff check --quiet .
	@$(RUN) pyright

dist: $(STAMP) ## build wheel and sdist, and use the wheel in an empty environment
	@$(RUN) pip install --quiet --disable-pip-version-check 'build>=1.2.1' 'twine>=6.1'
	@$(RUN) build --outdir dist .
	@$(RUN) twine check --strict dist/*
	@$(VENV)/bin/python .ci/try_wheel.py dist

docs: $(VENV)/.installed-docs ## build the site of the documentation in site/ and follow its links
	@NO_MKDOCS_2_WARNING=1 $(RUN) mkdocs build --quiet --strict --clean
	@$(VENV)/bin/python .ci/check_links.py site

format: $(STAMP) ## format the code and fix what lint can fix
	@$(RUN) ruff format --quiet .
	@$(RUN) ruff check --quiet --fix .

tests/js/node_modules/.installed: tests/js/package.json
	@cd tests/js && npm install --silent --no-audit --no-fund --no-package-lock --ignore-scripts && touch node_modules/.installed || \
	  echo 'The packages of tests/js could not be installed; tests in Node and in a browser are skipped.' >&2

$(VENV)/.installed-docs: $(STAMP)
	@$(RUN) pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt $(DOCS)
	@touch $@

$(STAMP): constraints.txt
$(LOWEST)/.installed: constraints-lowest.txt

# The folder of the environment is that of the stamp, and what it holds fixed the last thing that the stamp needs.
# Modules are compiled when they are first imported: most of those that are installed never are.
%/.installed: pyproject.toml
	@$*/bin/python -c '' 2>/dev/null || { \
	  $(PYTHON) -c 'import sys; sys.exit("" if sys.version_info < (3, 10) else 0)' 2>/dev/null || { \
	    echo 'Python 3.10 or newer is needed, "$(PYTHON)" is not: name one, e.g. make PYTHON=python3.12 $(MAKECMDGOALS)' >&2; exit 1; }; \
	  $(PYTHON) -m venv --clear $*; }
	@$*/bin/python -m pip --version >/dev/null 2>&1 || $*/bin/python -m ensurepip >/dev/null
	@echo 'Installing into $* (minutes, the first time) ...'
	@$*/bin/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint $(lastword $^) --editable '.[dev]'
	@touch $@
