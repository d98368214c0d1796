# make test and make demo work on a fresh clone: the environment below is made first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export PYTHONPATH := src

.PHONY: demo test check train fix bench figures gpu sanitize kernels clean

demo: $(STAMP)  ## denoise real photographs: a table, a picture and an HTML page in out/
	$(BIN)/python -m zeroskip demo --out out

test: check  ## everything that CI runs, CPU only
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: $(STAMP)  ## lint, types, and the direction of imports
	$(BIN)/ruff format --check src tests examples tools
	$(BIN)/ruff check src tests examples tools
	$(BIN)/mypy
	$(BIN)/lint-imports

train: $(STAMP)  ## train and prune ResNet-18 and VGG-19-BN into out/train; wants a GPU and ZEROSKIP_DATA, goes on where it stopped
	$(BIN)/python -m tools.train --out out/train

fix: $(STAMP)  ## what formatter and linter can mend by themselves
	$(BIN)/ruff format src tests examples tools
	$(BIN)/ruff check --fix src tests examples tools

bench: $(STAMP)  ## the CPU figures of the README, into benchmarks/results/
	$(BIN)/pip install -q -c constraints.txt -e '.[bench]'
	$(BIN)/python -m zeroskip bench benchmarks/suites/cpu.toml --out benchmarks/results/cpu.jsonl

figures: $(STAMP)  ## README's table and pictures, from committed records
	$(BIN)/python -m tools.figures

kernels: $(STAMP)  ## compile every CUDA kernel for every architecture (long): registers, spills, seconds; needs no GPU
	$(BIN)/python -m tools.kernels --suites $(addprefix benchmarks/suites/,$(addsuffix .toml,fig10 fig11 squares conv3x3 depthwise networks_cuda))

sanitize: $(STAMP)  ## every kernel under compute-sanitizer, on a machine with an NVIDIA GPU
	$(BIN)/python tools/sanitize.py

gpu: $(STAMP)  ## tests that need an NVIDIA GPU
	$(BIN)/python -m pytest -m gpu

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) out
