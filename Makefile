PYTHON ?= python3
DEVICE ?= auto
BIN := .venv/bin
# Hundreds of processes of the tests would each compile our modules.
unexport PYTHONDONTWRITEBYTECODE

# These import torch, which takes longer than many tests, or start workers in all of their tests.
HEAVY := tests/end_to_end tests/faults tests/training tests/workers/scoring tests/workers/test_worker.py \
    tests/workers/test_metrics.py tests/earmark/test_catalog.py

# A program and the Debian packages that bring it, installed if it is missing.
debian = command -v $(1) > /dev/null || { \
    echo "Installing $(1)."; \
    root=; [ "$$(id -u)" = 0 ] || root=sudo; \
    $$root apt-get update -qq && \
    DEBIAN_FRONTEND=noninteractive $$root apt-get install -y -qq --no-install-recommends $(2) > /dev/null; \
} || { echo "$(1) is needed here: as root, apt-get install $(2); then the same again."; exit 1; }

.PHONY: help demo test test-fast test-chaos browser pooler bench bench-gpu lint docs audit fuzz chaos starter wheel clean

# A line that begins with a target and ends with "## ..." is what this shows.
help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/make \1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r target line; do \
	    printf '%-16s %s\n' "$$target" "$$line"; done

demo: .venv/ready ## serve the example clips on loopback, classify them by URL and show what is heard
	@$(BIN)/earmark demo --report demo.html

test: .venv/ready-dev browser pooler ## run the tests against real servers; what they need is installed
	@$(BIN)/python -m pytest -m "not chaos" --numprocesses 3

test-fast: .venv/ready-dev ## run the tests without workers, loaders, PostgreSQL, browser and torch
	@$(BIN)/python -m pytest -m "not slow and not chaos and not postgresql" --numprocesses 2 $(addprefix --ignore=,$(HEAVY))

test-chaos: .venv/ready-dev pooler ## have each fault happen on each database, and many in a row; the other long tests
	@$(BIN)/python -m pytest -m chaos --numprocesses 4 tests/faults $$(grep -rl mark.chaos tests --include="test_*.py")

browser: ## install Debian's Chromium, in which some tests look at pages
	@$(call debian,chromium,chromium fonts-liberation)

pooler: ## install Debian's PgBouncer, which some tests put in front of PostgreSQL
	@PATH="$$PATH:/usr/sbin"; $(call debian,pgbouncer,pgbouncer)

bench: .venv/ready-dev ## measure Earmark beside what one would use instead; long, its --help chooses less
	@$(call debian,ffmpeg,ffmpeg)
	@$(BIN)/python -m benchmarks.end_to_end

bench-gpu: .venv/ready-dev ## measure one worker on this machine's GPU (DEVICE=cpu: on its cores), within 5 minutes
	@$(BIN)/python -m benchmarks.gpu --device $(DEVICE)

lint: .venv/ready-dev ## check style, types and the direction of imports
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports

audit: .venv/ready ## list what is installed in sbom.json and look up its known weaknesses
	@test -d .venv/audit || $(PYTHON) -m venv .venv/audit
	@.venv/audit/bin/pip install --quiet --disable-pip-version-check pip-audit cyclonedx-bom
	@.venv/audit/bin/cyclonedx-py environment --output-file sbom.json $(BIN)/python
	@.venv/audit/bin/pip-audit --strict --requirement constraints.txt --no-deps --disable-pip

fuzz: .venv/ready-dev ## decode a few thousand damaged, hostile and joined files, some beside FFmpeg
	@$(call debian,ffmpeg,ffmpeg)
	@$(BIN)/python -m tests.workers.decoding.bad_audio
	@$(BIN)/python -m tests.workers.decoding.odd_lengths

chaos: .venv/ready-dev ## have 25 faults happen to 1,000 clips: make chaos SEED=1 DATABASE=postgresql
	@$(BIN)/python -m tests.faults.chaos --seed $(or $(SEED),1) --database $(or $(DATABASE),sqlite)

starter: .venv/ready ## train the bundled model, 20 minutes of two cores: make starter AUDIO="/path/to/audio /more"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check matplotlib
	@$(BIN)/python -m training.starter --audio $(AUDIO) $(if $(SMOKE),--smoke)

# Its pictures are made again with `python -m docs.pictures`.
docs: .venv/ready-dev ## build the documentation's site into build/site
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --group docs
	@$(BIN)/python -m docs.reference
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

wheel: .venv/ready ## build the wheel into dist, install it in an environment of its own and run it there
	@rm -rf dist && $(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
	@PYTHON=$(PYTHON) sh .github/try_wheel.sh dist/*.whl

clean: ## remove what the other targets made in this folder
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build dist

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "This needs Python 3.11 or newer. Name one: make demo PYTHON=python3.12"; exit 1; }
	@echo "Installing into .venv, PyTorch included; this takes a few minutes and prints nothing."
	@$(PYTHON) -m venv .venv || { rm -rf .venv; $(PYTHON) -m pip install --quiet virtualenv && $(PYTHON) -m virtualenv --quiet .venv; }

.venv/ready: .venv/bin/python pyproject.toml constraints.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	@touch $@

.venv/ready-dev: .venv/ready
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=25.1" # it knows --group
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable . --group dev
	@touch $@
