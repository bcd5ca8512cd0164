# Everything from a clean clone: needs Python 3.10 to 3.13, make and the package registries.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo-run

FUZZ_S := 300
TORCH ?= auto
COMMA := ,
PYTEST = $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: help demo docs test test-slow test-all test-gpu audit fuzz chaos format clean
.DEFAULT_GOAL := help

help: ## print this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 18

# Installs torch first where a build of it is chosen: pip then finds its requirement satisfied.
define install
	$(PYTHON) -m venv $(VENV)
	torch="$$($(BIN)/python tools/choose_torch.py $(TORCH))" && \
		{ test -z "$$torch" || $(BIN)/python -m pip install --quiet $$torch; }
	$(BIN)/python -m pip install --quiet --editable '.[$(1)]'
endef

$(VENV)/.cpu: pyproject.toml
	$(call install,cpu)
	@touch $@

$(VENV)/.dev: pyproject.toml
	$(call install,cpu$(COMMA)dev)
	@touch $@ $(VENV)/.cpu

demo: $(VENV)/.cpu ## set up, label the bundled shards, end with the path of the report
	$(BIN)/ratecluster run --shards examples/noto-emoji --root $(DEMO) \
		--config jobs/configs/demo.toml

docs: $(VENV)/.dev ## build the documentation: site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

test: $(VENV)/.dev ## set up, then ruff, mypy and the quick tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) -m "not slow"

test-slow: $(VENV)/.dev ## the other tests: faults, clusters of many nodes, jobs, browsers, large inputs
	$(PYTEST) -m slow

test-all: test test-slow ## both

test-gpu: $(VENV)/.dev ## the tests that need a CUDA device, then embed compared with a DataLoader loop
	$(BIN)/python -c "import sys, torch; sys.exit(torch.cuda.device_count() < 1 and 'torch sees no CUDA device: see nvidia-smi, and that torch was built for it')"
	$(BIN)/python -m pytest -m gpu tests/gpu
	$(BIN)/python -m benchmarks.embed --device cuda --shards examples/noto-emoji

audit: $(VENV)/.dev ## list the known vulnerabilities of the installed packages; needs pypi.org
	$(BIN)/pip-audit --strict --skip-editable --progress-spinner off

fuzz: $(VENV)/.dev ## search for bytes that break the reader or the decoder, FUZZ_S=300 seconds each
	@mkdir -p .fuzz
	for name in reader decoder texts; do $(BIN)/python -m tests.fuzz $$name .fuzz/$$name \
		-artifact_prefix=.fuzz/$$name- -max_total_time=$(FUZZ_S) -max_len=20000 -timeout=20 \
		-rss_limit_mb=2000 || exit 1; done

chaos: $(VENV)/.dev ## inject a hundred faults into runs and check that nothing is lost: an hour
	$(BIN)/python -m tests.chaos

format: $(VENV)/.dev ## format the code and apply the fixes that ruff can make
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove the demo's run and the virtual environment
	rm -rf $(DEMO) $(VENV)
