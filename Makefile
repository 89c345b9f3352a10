# The two commands are `make compress` and `make test`; both set up .venv by themselves.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RECIPE ?= mini
ARGS ?=
# Processes that share the tests out, a file to each; about 1.5 GB of memory for each. 0 runs them in one, for a debugger.
WORKERS ?= 2
# test-lowest: an environment of its own. The lowest declared torch is 2.10, whose Linux wheels on the package index are CUDA builds of
# gigabytes; 2.13.0 is the oldest one that is at hand as a CPU build. LOWEST_TORCH=2.10.0 tests the bound itself.
VENV_LOWEST ?= .venv-lowest
LOWEST_TORCH ?= 2.13.0

# test-voxtral: an environment of its own as well, because mistral-common wants an older NumPy than constraints.txt names.
VENV_VOXTRAL ?= .venv-voxtral

# test-ui: an environment of its own, because Gradio wants an older tomlkit than constraints.txt names. The tests in a browser need
# Chromium as well (on Debian: apt-get install chromium fonts-noto-cjk).
VENV_UI ?= .venv-ui

# test-vllm: an environment of its own, which vLLM's requirements fill.
VENV_VLLM ?= .venv-vllm

.PHONY: compress test test-slow test-lowest test-voxtral test-ui test-vllm test-llama test-gpu lint format bench dist clean

compress: $(VENV)/.ready
	$(BIN)/trimlingual compress $(RECIPE) $(ARGS)

test: $(VENV)/.ready
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile $(ARGS)

test-slow: $(VENV)/.ready
	$(BIN)/python -m pytest -m slow $(ARGS)

test-gpu: $(VENV)/.ready
	$(BIN)/python -m pytest -m gpu $(ARGS)

test-lowest: $(VENV_LOWEST)/.ready
	@echo "lowest declared versions (constraints-lowest.txt), with torch $(LOWEST_TORCH)"
	$(VENV_LOWEST)/bin/python -m pytest --numprocesses $(WORKERS) --dist loadfile $(ARGS)

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

$(VENV_LOWEST)/.ready: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv $(VENV_LOWEST)
	$(VENV_LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-lowest.txt torch==$(LOWEST_TORCH)
	$(VENV_LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-lowest.txt --editable '.[dev]'
	touch $@

# $(1): an extra that wants an older version of the package $(2) than constraints.txt names
define environment
	$(PYTHON) -m venv $(@D)
	grep -v '^$(2)==' constraints.txt > $(@D)/constraints.txt
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(@D)/constraints.txt torch
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(@D)/constraints.txt --editable '.[dev,$(1)]'
	touch $@
endef

# sdist and wheel; the wheel is installed in a fresh environment outside the checkout, and the built-in recipe runs there
dist:
	tools/dist.sh $(PYTHON)

test-voxtral: $(VENV_VOXTRAL)/.ready
	$(VENV_VOXTRAL)/bin/python -m pytest -k 'voxtral or tekken' $(ARGS)

$(VENV_VOXTRAL)/.ready: pyproject.toml constraints.txt
	$(call environment,voxtral,numpy)

test-ui: $(VENV_UI)/.ready
	$(VENV_UI)/bin/python -m pytest tests/test_ui.py tests/test_report_page.py $(ARGS)

$(VENV_UI)/.ready: pyproject.toml constraints.txt
	$(call environment,ui,tomlkit)

# every test clip of the built-in speech by the runtimes that exports are for; minutes. test-llama trains a model that hears padding first
test-vllm: $(VENV)/.ready $(VENV_VLLM)/.ready
	$(BIN)/python benchmarks/runtimes.py --vllm $(VENV_VLLM)/bin/python $(ARGS)

test-llama: $(VENV)/.ready
	$(BIN)/trimlingual finetune mini --run-dir runs/mini-window --set model.audio_padding=window
	$(BIN)/python benchmarks/runtimes.py --heard runs/mini-window/teacher --unheard $(ARGS)

$(VENV_VLLM)/.ready: tools/vllm_env.sh
	tools/vllm_env.sh $(VENV_VLLM) $(PYTHON)
	touch $@

bench: $(VENV)/.ready
	$(BIN)/python benchmarks/mini_compress.py

clean:
	rm -rf $(VENV) $(VENV_LOWEST) $(VENV_VOXTRAL) $(VENV_UI) $(VENV_VLLM) dist .pytest_cache .mypy_cache .ruff_cache
