# The whole book from here; `make` lists the commands.
SHELL := /bin/bash
PYTHON ?= python3
PROFILE ?= quick
CORES ?= all
# a worker a core; more than eight would only import PyTorch once more
WORKERS ?= $(shell cores=$$(getconf _NPROCESSORS_ONLN 2> /dev/null || echo 2); echo $$((cores < 8 ? cores : 8)))
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help figures chapter test test-compilers test-fast test-versions torture licences test-long verify bench gpu proofs lab book-check page-test book api pdf slides publish lint clean

help:  ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  PROFILE=smoke|quick|cpu|cpu-cifar10|gpu|paper, or the path of a YAML file (now $(PROFILE))   CORES=n (now $(CORES))   PYTHON=python3.11"

figures: $(READY)  ## train, attack, certify and run every chapter: figures/PROFILE/, results/PROFILE/; killed, run it again
	$(BIN)/python -m snakemake --cores $(CORES) --config profile='$(PROFILE)' --keep-incomplete --rerun-incomplete \
	  --nolock --quiet rules
	@$(BIN)/python -m tools.compare --profile '$(PROFILE)'

chapter: $(READY)  ## one chapter with other parameters: make chapter NAME=06-is-it-real ARGS='-p pictured_eps=0.2'
	$(BIN)/python -m tools.execute "notebooks/$(NAME).md" --profile '$(PROFILE)' \
	  --output "_build/chapter/$(NAME).ipynb" $(ARGS)

test-long: $(READY)  ## the random configurations of the certificates, twenty times as many
	CLUSTR_TEST_CONFIGURATIONS=10000 $(BIN)/python -m pytest tests/certificates/test_ladder.py

test: $(READY)  ## every test: units, properties, notebooks in profile smoke, the book
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadscope --no-loadscope-reorder

test-compilers: $(READY)  ## the GPU kernels under every Triton, oldest and newest torch: no GPU, 15 GB into _build/compilers
	$(BIN)/python -m tools.compilers

test-versions: $(READY)  ## every test under the oldest and the newest versions declared: constraints/, 12 GB into _build/versions
	$(BIN)/python -m tools.versions

licences: $(READY)  ## the licences of all that is installed, and a bill of materials: _build/licences.md, _build/sbom.json
	test -x _build/licences/bin/python || $(PYTHON) -m venv _build/licences
	_build/licences/bin/python -m pip install --quiet --disable-pip-version-check 'pip-licenses>=5,<6' 'cyclonedx-bom>=7,<8'
	_build/licences/bin/pip-licenses --python=$(BIN)/python --format=markdown --with-urls --order=license --output-file=_build/licences.md
	_build/licences/bin/cyclonedx-py environment --output-reproducible --output-file _build/sbom.json $(BIN)/python
	@echo "_build/licences.md: $$(($$(wc -l < _build/licences.md) - 2)) packages; _build/sbom.json: CycloneDX"

torture: $(READY)  ## hostile files and words, troubles, a thousand kills: what was tried, and what was lost (half an hour, Linux)
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.torture

test-fast: $(READY)  ## the inner loop, under two minutes: numerics, storage, models, sampling, attacks' balls and results
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadscope --no-loadscope-reorder -q tests/test_house.py tests/storage tests/numerics/test_distances.py \
	  tests/models/test_clusters.py tests/models/test_classifiers.py tests/training/test_sampling.py \
	  tests/training/test_recipes.py tests/attacks/test_ball.py tests/certificates/test_ladder.py

verify: $(READY)  ## every measured number of the pages against its table, every table against its sidecar, a share of the rows again
	$(BIN)/python -m tools.verify

bench: $(READY)  ## everything that is timed, beside its targets (nothing else should be running): results/bench/
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps adv-lib==0.2.8
	$(BIN)/python -m benchmarks

STAGES ?= tests kernels steps leg
MINUTES ?= 14
gpu: $(READY)  ## a quarter of an hour on a GPU: make gpu STAGES='tests kernels steps leg' MINUTES=14; results in legs/session
	$(BIN)/python -m tools.gpu --into legs/session --stages $(STAGES) --minutes '$(MINUTES)' $(ARGS)

proofs:  ## check the proof of the certificates with Coq, and print what it assumes (Debian: apt-get install coq)
	@command -v coqc > /dev/null || { echo "make proofs: coqc is needed (Debian: apt-get install coq)" >&2; exit 1; }
	mkdir -p _build/proofs && cp proofs/*.v _build/proofs/
	cd _build/proofs && for file in *.v; do coqc "$$file" || exit 1; done

lab: $(READY)  ## open the book in JupyterLab: a double click on notebooks/NN-topic.md opens the chapter
	$(BIN)/python -m tools.lab

book-check: $(READY)  ## validate the whole book offline: references, embeds, links, images, citations
	$(BIN)/python -m tools.book_check

page-test: $(READY)  ## look at every page of the whole site in a browser: make page-test THEME=PATH-OF-A-BUILT-THEME
	$(BIN)/python -m tools.page_test '$(THEME)'

book: $(READY)  ## build the site into _build/html (needs internet once, for the theme; Node 20)
	$(BIN)/python -m jupyter_book build --html --strict

api: $(READY)  ## write api.md, the page of the package's public names, from their docstrings
	$(BIN)/python -m tools.api

pdf: $(READY)  ## the whole book as one PDF, offline: _build/pdf/clustr-book.pdf (Node 20)
	$(BIN)/python -m tools.pdf

slides: $(READY)  ## one lecture from chapters 1, 2 and 6, and the same with notes, offline: _build/slides/ (Node 20)
	$(BIN)/python -m tools.slides

publish: figures  ## make what was regenerated the published: results/published/, figures/published/, the chapters' twins
	$(BIN)/python -m tools.publish --profile '$(PROFILE)'

lint: $(READY)  ## ruff, ruff format, pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:  ## remove what a build leaves (not runs/, not data/, not .venv)
	rm -rf _build .snakemake .pytest_cache .ruff_cache .hypothesis *.egg-info

# A virtual environment, once; again when the dependencies change.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: Python 3.11 or newer is needed, got $$($(PYTHON) --version 2>&1): try make PYTHON=python3.11" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@
