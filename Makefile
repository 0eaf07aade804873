# make demo    align the shipped small model and open runs/demo/report.html afterwards
# make test    lint, types and tests
# make env     versions, devices and threads
#
# Each makes its own environment in .venv first, from Python >= 3.11, make and a package registry alone. It is made
# again when pyproject.toml or constraints.txt change, and retried when an installation was cut off.
#
# Which build of torch: pip takes the best one that its registries and find-links offer. On Linux the public
# registry has the CUDA build, which also runs without a GPU (5 GB more to download). A CPU build, where offered
# (PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL or pip's configuration), ranks higher and is taken, except on a machine with
# an NVIDIA GPU: there a build that cannot use it is replaced by the registry's own.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV ?= .venv
PYTHON ?= python3.11 python3 python3.13 python3.12
OUT ?= runs/demo
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)

# One thread a process: spinning threads of two processes on the same cores slow both down tenfold.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 \
  DIFFPREF_TEST_TORCHVISION=$(abspath $(VENV))/torchvision
TEST_ARGS ?= -m "not slow"

.PHONY: help demo test lint types pytest env install clean

help:
	@sed -n '/^$$/q; s/^# \{0,1\}//p; /^#$$/q' Makefile

demo: install
	$(BIN)/diffpref demo --out $(OUT)

test: lint types pytest

lint: install
	$(BIN)/ruff check .

types: install
	$(BIN)/mypy

pytest: install
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 $(TEST_ARGS)

env: install
	@$(BIN)/diffpref env

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@for python in $(PYTHON); do \
	  if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found="$$python"; break; fi; \
	done; \
	if [ -z "$${found:-}" ]; then echo "error: no Python >= 3.11 among: $(PYTHON)" >&2; \
	  echo "  fix: install python3.11, or make ... PYTHON=/path/to/python" >&2; exit 2; fi; \
	rm -f $(STAMP); \
	if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	  echo "creating $(VENV) with $$("$$found" --version)"; rm -rf $(VENV); \
	  "$$found" -m venv $(VENV) || { rm -rf $(VENV); echo "  fix: Debian and Ubuntu need the package python3-venv" >&2; exit 2; }; \
	fi
	@echo "installing the pinned set into $(VENV) (1.5 to 6 GB the first time)"
	PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_BUILD_CONSTRAINT=constraints.txt \
	  $(BIN)/python -m pip install --quiet -c constraints.txt -e ".[test]"
	@# Its CLIP vocabulary is for the tests' model miniatures; its dependency torchvision would break a CPU torch.
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt open_clip_torch
	@# Beside the environment, not in it: only the tests of open_clip's evaluators see this folder.
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/torchvision -c constraints.txt torchvision
	@if nvidia-smi -L >/dev/null 2>&1 \
	  && ! $(BIN)/python -c 'import sys, torch; sys.exit(not (torch.version.cuda or torch.version.hip))'; then \
	  echo "NVIDIA GPU found: replacing the CPU build of torch"; \
	  $(BIN)/python -m pip install --quiet -c constraints.txt "torch===$(TORCH)" \
	    || echo "warning: no CUDA build of torch $(TORCH) to be had; running on the CPU" >&2; \
	fi
	@touch $(STAMP)

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache
