# make demo: classify the example clips      make test: run all tests      make lint: ruff, mypy, import-linter
PYTHON ?= python3
BIN := .venv/bin

# A program and the Debian packages that bring it, installed if it is missing.
debian = command -v $(1) > /dev/null || { \
    echo "Installing $(1)."; \
    root=; [ "$$(id -u)" = 0 ] || root=sudo; \
    $$root apt-get update -qq && \
    DEBIAN_FRONTEND=noninteractive $$root apt-get install -y -qq --no-install-recommends $(2) > /dev/null; \
} || { echo "$(1) is needed here: as root, apt-get install $(2); then the same again."; exit 1; }

.PHONY: demo test browser bench lint docs audit fuzz chaos starter clean

# Serve the example clips on loopback, classify them by URL and show what is heard.
demo: .venv/ready
	@$(BIN)/earmark demo --report demo.html

# Run the tests against real servers; everything they need is installed here.
test: .venv/ready-dev browser
	@$(BIN)/python -m pytest --numprocesses 3 --dist worksteal -m "not slow"

# Some tests look at pages in Debian's Chromium.
browser:
	@$(call debian,chromium,chromium fonts-liberation)

# Measure Earmark beside what one would use instead, side by side in one run; it takes long, its --help chooses less.
bench: .venv/ready-dev
	@$(call debian,ffmpeg,ffmpeg)
	@$(BIN)/python -m benchmarks.end_to_end

# Check style, types and the direction of imports.
lint: .venv/ready-dev
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports

# List what is installed in sbom.json (CycloneDX), and look up the known weaknesses of every pinned package.
audit: .venv/ready
	@test -d .venv/audit || $(PYTHON) -m venv .venv/audit
	@.venv/audit/bin/pip install --quiet --disable-pip-version-check pip-audit cyclonedx-bom
	@.venv/audit/bin/cyclonedx-py environment --output-file sbom.json $(BIN)/python
	@.venv/audit/bin/pip-audit --strict --requirement constraints.txt --no-deps --disable-pip

# Decode a few thousand damaged and hostile files with a fresh seed.
fuzz: .venv/ready-dev
	@$(BIN)/python -m tests.workers.bad_audio

# Kill, stop, fill, lock and wipe what a list of 1,000 clips depends on, 25 times: make chaos SEED=1 DATABASE=postgresql
chaos: .venv/ready-dev
	@$(BIN)/python -m tests.faults.chaos --seed $(or $(SEED),1) --database $(or $(DATABASE),sqlite)

# Train the bundled model from folders of clips: make starter AUDIO="/path/to/audio /path/to/more"; 20 minutes of two cores.
starter: .venv/ready
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check matplotlib
	@$(BIN)/python -m training.starter --audio $(AUDIO) $(if $(SMOKE),--smoke)

# Build the documentation's site into build/site, without network; make its pictures again with `python -m docs.pictures`.
docs: .venv/ready-dev
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt "mkdocs-material>=9.6"
	@$(BIN)/python -m docs.reference
	@$(BIN)/mkdocs build --strict --quiet

# Remove what the other commands made in this folder.
clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build dist

.venv/bin/python:
	@echo "Setting up .venv; the first time this takes a few minutes."
	@$(PYTHON) -m venv .venv || { rm -rf .venv; $(PYTHON) -m pip install --quiet virtualenv && $(PYTHON) -m virtualenv --quiet .venv; }

.venv/ready: .venv/bin/python pyproject.toml constraints.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	@touch $@

.venv/ready-dev: .venv/ready
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $@
