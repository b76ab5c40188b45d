# Needs Python 3.11 or newer; everything else is installed into $(VENV) on first use.
# VENV=path takes another environment, PYTHON=path another interpreter to make it with.

VENV ?= .venv
PYTHON ?= $(firstword $(foreach p,python3 python3.11 python3.12 python3.13 python3.14, \
	$(shell $(p) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(p))))
BIN := $(VENV)/bin
export BIN
INSTALLED := $(VENV)/.installed
# uv installs faster than pip, which comes in where an index is known to pip only. Compiled, as many processes import torch.
REQUIRED = -c constraints.txt -e '.[dev]'
STAGES := curation sft bench rl
# make demo TASK=edit edits images instead of generating them.
TASK ?= gen
ROUNDS := two three
PARTS := critic proof served
# With REGISTRY=host/path the compiled pipelines take the images from there, with MODEL_CACHE=claim their steps mount the
# chart's model cache; this file says which they have.
export MODEL_CACHE
REGISTRY_FILE := build/pipelines/.registry
REGISTERED = $(if $(REGISTRY),sed -i 's#image: firm/#image: $(REGISTRY)/firm/#' $@)
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -q -n 3 --dist loadfile --no-loadscope-reorder
PIPELINE = $(INSTALLED) $(REGISTRY_FILE) $(wildcard pipelines/*.py) firm/__init__.py firm/launch/k8s/names.py

.DEFAULT_GOAL := help

##@ Use
.PHONY: help demo pipelines
help: ## Show this help
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {printf "\n%s\n", substr($$0, 5)} \
		/^[a-z-]+:.*## / {printf "  %-14s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(INSTALLED) ## Run the whole pipeline on this machine with tiny models; TASK=edit runs that of an editor
	$(BIN)/firm run $(TASK)-shapes

pipelines: $(patsubst %,build/pipelines/%.yaml,full $(ROUNDS) $(PARTS) $(STAGES)) ## Compile the pipelines for Kubeflow to build/pipelines
	@ls build/pipelines/*.yaml

##@ Kubernetes (charts/kind/settings.sh has the settings, such as KFP=0)
.PHONY: images kind-up kind-run kind-down
images: ## Build the images firm/runtime and firm/slim; REGISTRY=host/path tags and pushes them
	images/build

kind-up: $(INSTALLED) ## A kind cluster with images and both charts
	charts/kind/up

kind-run: build/pipelines/full.yaml ## Submit the shapes run with the kfp command line and wait
	charts/kind/run

kind-down: ## Delete the kind cluster
	charts/kind/down

##@ Check
.PHONY: test test-slow test-endurance test-charts test-cluster test-kfp lint bench gpu-check mutations planted
test: lint ## Check and test everything that needs this machine only
	$(PYTEST) -m "not slow and not endurance and not bench and not docker and not cluster and not kfp"

test-slow: $(INSTALLED) ## Whole runs in rounds, kills in every stage, full disks and long simulations
	$(PYTEST) -m slow

test-endurance: $(INSTALLED) ## Fifty kills, pairs of runs (PAIRS=20 makes more), ablations by the command; hours
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -q -m endurance

test-charts: $(INSTALLED) ## Test the Helm charts without a cluster (part of test)
	$(BIN)/python -m pytest tests/charts -q

test-cluster: $(INSTALLED) ## From nothing to a kind cluster with both charts, then the tests marked cluster
	$(BIN)/python -m pytest tests/cluster -q -s -m cluster

test-kfp: $(INSTALLED) ## The same with the KFP backend
	$(BIN)/python -m pytest tests/cluster -q -s -m "kfp and not bench"

lint: $(INSTALLED) ## Check format, style, types, imports and YAML
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/yamllint --strict firm .pre-commit-config.yaml .yamllint charts/*/Chart.yaml charts/*/values.yaml charts/*/ci
	$(BIN)/python charts/generate.py --check

bench: $(INSTALLED) ## Measure: ratios against the reference on this machine
	$(BIN)/python -m pytest tests/benchmarks -q -s -m bench

gpu-check: $(INSTALLED) ## On a GPU: models of the real sizes, random weights; a rollout, an update, a step of sft; to docs/gpu
	$(BIN)/python -m firm.gpu_check docs/gpu $(TFLOPS)

mutations: $(INSTALLED) ## Plant faults in a copy, one at a time; none may go unnoticed
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutations.py

planted: $(INSTALLED) ## Planted critics against gate and auditor; what docs/planted.jsonl lacks is run, for hours
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -m planted.run build/planted

##@ Change
.PHONY: fix golden generate clean
fix: $(INSTALLED) ## Format, and fix what can be fixed automatically
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

generate: $(INSTALLED) ## Regenerate the charts' schemas and tables of values from values.yaml
	$(BIN)/python charts/generate.py

golden: $(INSTALLED) ## Rewrite the golden files; review them with git diff
	$(BIN)/python -m pytest tests -q -m golden --golden

clean: ## Remove build outputs and caches; runs and the environment stay
	rm -rf build dist *.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache

# ---- files

$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "FIRM needs Python 3.11 or newer, none was found: install it, or give PYTHON=path" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt uv
	$(BIN)/uv pip install --quiet --no-cache --compile-bytecode --python $(BIN)/python $(REQUIRED) || \
		$(BIN)/python -m pip install --quiet $(REQUIRED)
	@touch $@

.PHONY: registry
$(REGISTRY_FILE): registry
	@mkdir -p $(@D)
	@echo '$(REGISTRY) $(MODEL_CACHE)' | cmp -s - $@ || echo '$(REGISTRY) $(MODEL_CACHE)' >$@

build/pipelines/full.yaml: $(PIPELINE)
	$(BIN)/kfp dsl compile --py pipelines/full.py --output $@
	$(REGISTERED)

$(ROUNDS:%=build/pipelines/%.yaml): build/pipelines/%.yaml: $(PIPELINE)
	$(BIN)/kfp dsl compile --py pipelines/rounds.py --function $* --output $@
	$(REGISTERED)

$(PARTS:%=build/pipelines/%.yaml): build/pipelines/%.yaml: $(PIPELINE)
	$(BIN)/kfp dsl compile --py pipelines/parts.py --function $* --output $@
	$(REGISTERED)

build/pipelines/%.yaml: $(PIPELINE)
	$(BIN)/kfp dsl compile --py pipelines/stages.py --function $* --output $@
	$(REGISTERED)
