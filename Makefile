# Everything runs in a local .venv; only Python 3.11+ and make are needed beforehand.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --quiet
PIP := $(INSTALL) --constraint tests/constraints.txt

# Tests start many child processes, which would compile every module anew each time.
unexport PYTHONDONTWRITEBYTECODE

# How long `make fuzz` runs.
MINUTES ?= 10

.PHONY: help demo fuzz test test-fast test-matrix test-models test-kernels lint format docs bench dist clean

help:
	@echo "make demo    squeeze the bundled adapter and print the report"
	@echo "make test    run the whole test suite; make test-fast leaves out PEFT and other consumers"
	@echo "make test-matrix  test every class under every naming with fuse, merge, convert, squeeze"
	@echo "make test-models  test every class of transformers, and of diffusers with a table, that builds tiny"
	@echo "make test-kernels  run the numeric tests under each matrix kernel of OpenBLAS"
	@echo "make fuzz MINUTES=10  mutate files of every format, and keep what breaks loratools"
	@echo "make lint    check style, types and import layers"
	@echo "make docs    build the documentation into build/docs; a warning is an error"
	@echo "make bench   measure speed and memory against peers and copying"
	@echo "make dist    build sdist and wheel, check them, and write the wheel's bill of materials"

$(VENV)/.base: pyproject.toml tests/constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	@touch $@

# Every file is held to its hash where the lock fits, as in CI. Elsewhere versions alone are pinned.
LOCKED := import sys, platform; sys.exit((sys.version_info[:2], sys.platform, platform.machine()) \
    != ((3, 11), "linux", "x86_64"))

$(VENV)/.dev: pyproject.toml tests/constraints.txt tests/locked.txt tests/earlier.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	if $(BIN)/python -c '$(LOCKED)'; then \
	    $(PIP) --require-hashes --no-deps --requirement tests/locked.txt && \
	    $(PIP) --no-deps --no-build-isolation --editable .; \
	else \
	    $(PIP) "pip>=25.1" && $(PIP) --editable . --group lint --group test; \
	fi
	$(INSTALL) --require-hashes --no-deps --upgrade --target $(VENV)/earlier --requirement tests/earlier.txt
	@touch $(VENV)/.base $@

demo: $(VENV)/.base
	$(BIN)/loratools info examples/tiny-llama/lora
	$(BIN)/loratools squeeze examples/tiny-llama/lora --output demo-out --overwrite --rank 8

test: $(VENV)/.dev
	$(BIN)/python -m pytest --numprocesses 2 $(ARGS)

test-fast: $(VENV)/.dev
	$(BIN)/python -m pytest --numprocesses 2 --fast $(ARGS)

test-matrix: $(VENV)/.dev
	$(BIN)/python -m pytest --numprocesses 2 --models tests/consumers/test_matrix_of_names.py $(ARGS)

test-models: $(VENV)/.dev
	$(BIN)/python -m pytest --numprocesses 2 --models tests/consumers/test_model_classes.py tests/consumers/test_gguf_rows.py tests/singlefile/test_loaded_by_diffusers.py $(ARGS)

test-kernels: $(VENV)/.dev
	$(BIN)/python tests/run_kernels.py --numprocesses 2 $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.dev
	$(BIN)/mkdocs build --strict --site-dir build/docs

# MINUTES of mutations by number, and as many of those that coverage guides, where atheris installs.
fuzz: $(VENV)/.dev
	-$(PIP) --only-binary atheris atheris 2>/dev/null
	$(BIN)/python tests/fuzz/run.py --minutes $(MINUTES) $(ARGS)
	$(BIN)/python tests/fuzz/guided.py --minutes $(MINUTES) $(ARGS)

bench: $(VENV)/.dev
	$(BIN)/python tests/benchmarks/bench.py $(ARGS)

dist: $(VENV)/.dev
	rm -rf dist
	$(BIN)/python tests/release/make_dist.py dist

clean:
	rm -rf $(VENV) demo-out build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
