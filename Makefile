# Every target bootstraps .venv by itself; Python 3.11 and make are all that is assumed.
PYTHON ?= python3.11
CONFIG ?= configs/demo.yaml
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# DeepSpeed would otherwise try to compile its operators while it is installed; none of them is used.
export DS_BUILD_OPS := 0

.DEFAULT_GOAL := help
.PHONY: help install demo test lint bench constraints clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

install: $(VENV)/.installed  ## create .venv with the pinned dependencies (CPU or CUDA build of torch, as the machine's index has it)

demo: $(VENV)/.installed  ## the whole pipeline on real images; resumes where it was killed (CONFIG=configs/demo.yaml ARGS="--force pretrain")
	@$(BIN)/python pipelines/run_workflow.py --config $(CONFIG) $(ARGS)

test: lint  ## ruff, mypy and every test (ARGS="-k name" selects)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(VENV)/.installed-dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy fluid_core

bench: $(VENV)/.installed-dev  ## measured ratios, side by side in one run; writes benchmarks/results/<date>.json
	$(BIN)/python -m benchmarks.run $(ARGS)

constraints: $(VENV)/.installed-dev  ## write constraints.txt from what is installed
	@{ echo "# Exact versions, written by \`make constraints\`. Torch's own CUDA packages are left to torch."; \
	   $(PIP) freeze --exclude-editable | grep -viE '^(nvidia-|triton|cuda-|#|-e )' | sed -E 's/^(torch==[0-9.]+)\+.*/\1/'; \
	 } > constraints.tmp && mv constraints.tmp constraints.txt

clean:  ## remove .venv (the runs stay)
	rm -rf $(VENV)

$(VENV)/.python:
	@command -v $(PYTHON) > /dev/null || { echo "error: $(PYTHON) was not found: install Python 3.11 (Debian: apt-get install python3.11 python3.11-venv) or run make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' || { echo "error: $(PYTHON) is $$($(PYTHON) -V 2>&1); Python 3.11 or 3.12 is needed: run make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || { echo "error: $(PYTHON) cannot make virtual environments: install python3.11-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.python pyproject.toml constraints.txt
	$(PIP) install -c constraints.txt torch setuptools wheel
	$(PIP) install -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@
