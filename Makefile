# Each target makes its own .venv from pinned versions; nothing else is needed
# than a Python 3.11 or later with pip.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
STAMP := $(VENV)/.installed
PEERS := $(CURDIR)/.venv-peers/bin/python

.PHONY: help run test test-all lint format notebooks bench bench-peers scale \
	lock clean

help:  ## Says what there is to make.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-12s%s\n", $$1, $$2}' \
	  $(MAKEFILE_LIST)

run: $(STAMP)  ## Trains contrastive encoders on digits and draws the figure.
	$(BIN)/python -m emc2.experiments.contrastive \
	  --workdir=runs/contrastive $(ARGS)

test: lint  ## Lints and runs the tests; no network, two cores, 20 minutes.
	$(BIN)/python -m pytest -n 2 -m 'not slow' $(ARGS)

test-all: lint  ## Also the slow tests, some of which need a package index.
	$(BIN)/python -m pytest -n 2 $(ARGS)

lint: $(STAMP)  ## Checks form and style.
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(STAMP)  ## Puts every file into form.
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

notebooks: $(STAMP)  ## Executes all notebooks, at smoke size; writes nothing.
	EMC2_SMOKE=1 $(BIN)/jupyter-execute --timeout=600 notebooks/*.ipynb

bench: $(STAMP)  ## Measures: `make bench ARGS=contrastive`.
	$(if $(wildcard $(PEERS)),EMC2_PEERS_PYTHON=$(PEERS)) \
	  $(BIN)/python -m emc2.experiments.bench $(ARGS)

bench-peers:  ## Installs what the bench compares with, apart, on a CPU.
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet torch==2.13.0 \
	  pytorch-metric-learning==2.9.0 scikit-learn gensim==4.4.0 \
	  tomotopy==0.14.0 myfm==0.4.0
	.venv-peers/bin/python -m pip install --quiet --no-deps libauc==2.0.1

scale: $(STAMP)  ## Compiles for TPUs that are not here: `make scale ARGS=esvi`.
	$(BIN)/python -m pip install --quiet libtpu==0.0.52
	JAX_PLATFORMS=cpu $(BIN)/python -m emc2.experiments.scale $(ARGS)

lock: $(STAMP)  ## Pins the newest versions that setup.cfg allows.
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile setup.cfg --extra experiments --extra test \
	  --extra notebooks --universal --python-version 3.11 --upgrade \
	  --no-annotate --custom-compile-command 'make lock' \
	  --output-file requirements.lock

clean:  ## Removes what can be made again; runs/ stays.
	rm -rf $(VENV) .venv-peers build dist *.egg-info .pytest_cache .ruff_cache
	find emc2 experiments tests transforms -name __pycache__ -prune \
	  -exec rm -rf {} +

$(STAMP): requirements.lock setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps -e .
	touch $@
