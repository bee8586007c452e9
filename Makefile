# The virtual environment .venv is made once: a stamp file says what is in it and for which pyproject.toml and
# constraints.txt. So is .venv-oldest, which has the oldest transformers that is supported, and nothing but it and torch.
# Variables for the command line:
#   PYTHON       the interpreter .venv is made with (3.11 or newer)
#   TORCH_INDEX  address of an extra package index for torch, e.g. that of its CPU builds (see CONTRIBUTING.md)
#   TORCH        what `make test-newest` installs as torch, e.g. torch==2.13.0
#   MODEL        the model folder `make demo` runs
PYTHON ?= python3
TORCH_INDEX ?=
TORCH ?= torch
MODEL = hub_cards/edlm-stories

PYTHON_VENV = .venv/bin/python
PIP = -m pip install -q --disable-pip-version-check -c
PIP_INSTALL = $(PYTHON_VENV) $(PIP) constraints.txt
PIP_NEWEST = .venv-newest/bin/python -m pip install -q --disable-pip-version-check

# TORCH_INDEX is the choice of a CPU build; with an NVIDIA driver the default build is the right one.
CPU_INDEX = $(if $(TORCH_INDEX),$(if $(shell command -v nvidia-smi),,--extra-index-url $(TORCH_INDEX)))

.PHONY: demo test test-newest app lint bench docs model clean
.DEFAULT_GOAL = test

demo: .venv/.stamp-demo model
	$(PYTHON_VENV) hub_cards/demo.py --model $(MODEL)

test: .venv/.stamp-test .venv/.stamp-chromium .venv-oldest/.stamp model
	$(PYTHON_VENV) -m pytest tests -n auto --maxprocesses 8 --dist worksteal

# The suite with the newest versions that pip finds today, without constraints, in an environment of its own: what a user
# gets. It is made anew each time. TORCH says which torch, where the newest is not wanted.
test-newest: .venv/.stamp-chromium .venv-oldest/.stamp model
	$(PYTHON) -m venv --clear .venv-newest
	$(PIP_NEWEST) setuptools $(TORCH) $(CPU_INDEX)
	$(PIP_NEWEST) --no-build-isolation $(TORCH) -e '.[test]'
	.venv-newest/bin/python -m pip freeze | grep -E '^(torch|transformers|tokenizers|peft|huggingface|datasets|gradio)='
	.venv-newest/bin/python -m pytest tests -n auto --maxprocesses 8 --dist worksteal

# The Space, at the address that it prints.
app: .venv/.stamp-space model
	$(PYTHON_VENV) spaces_app/app.py

lint: .venv/.stamp-test
	$(PYTHON_VENV) -m ruff check .
	$(PYTHON_VENV) -m ruff format --check .
	$(PYTHON_VENV) -m mypy

bench: .venv/.stamp-test model
	$(PYTHON_VENV) -m bench

# The documentation as a site, into site/. A link that leads nowhere is an error.
docs: .venv/.stamp-docs
	$(PYTHON_VENV) -m mkdocs build --strict

# A Hub repo holds its code: the copies in hub_cards/*/ and hub_cards/metrics/*/ are made here and are not tracked.
model: .venv/.stamp-demo
	$(PYTHON_VENV) hub_cards/publish/assemble.py

# torch comes first and alone, so that nothing after it pulls a second build; setuptools is in .venv, so that
# building this package (without isolation) obeys constraints.txt too.
.venv/.stamp-demo: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("$(PYTHON) is Python %d.%d, but 3.11 or newer is needed: make PYTHON=/path/to/python3.11" % v[:2])'
	@echo "Installing into .venv (torch first; this takes some minutes)"
	test -x .venv/bin/pip || $(PYTHON) -m venv .venv
	$(PIP_INSTALL) setuptools torch $(CPU_INDEX)
	@$(PYTHON_VENV) -c 'import torch; print("torch", torch.__version__, "for CUDA" if torch.version.cuda else "for the CPU")'
	$(PIP_INSTALL) --no-build-isolation -e .
	@touch $@

.venv/.stamp-space: .venv/.stamp-demo
	$(PIP_INSTALL) --no-build-isolation -e '.[space]'
	@touch $@

.venv/.stamp-test: .venv/.stamp-demo
	$(PIP_INSTALL) --no-build-isolation -e '.[test]'
	@touch $@

.venv/.stamp-chromium: .venv/.stamp-test
	$(PYTHON_VENV) tests/support/chromium.py
	@touch $@

.venv/.stamp-docs: .venv/.stamp-demo
	$(PIP_INSTALL) --no-build-isolation -e '.[docs]'
	@touch $@

# What tests/test_loading.py loads with besides .venv. All versions but those in constraints-oldest.txt are the newest.
.venv-oldest/.stamp: constraints.txt constraints-oldest.txt | .venv/.stamp-demo
	@echo "Installing into .venv-oldest (torch again)"
	test -x .venv-oldest/bin/pip || $(PYTHON) -m venv .venv-oldest
	awk -F== 'NR == FNR {old[$$1]} NR == FNR || !($$1 in old)' constraints-oldest.txt constraints.txt > .venv-oldest/constraints.txt
	.venv-oldest/bin/python $(PIP) .venv-oldest/constraints.txt torch transformers $(CPU_INDEX)
	@touch $@

# Everything make made, .venv included; never runs/.
clean:
	rm -rf .venv .venv-oldest .venv-newest build dist site *.egg-info .pytest_cache .ruff_cache
	rm -f hub_cards/edlm-*/*.py hub_cards/metrics/*/metrics.py hub_cards/metrics/*/app.py
	rm -rf hub_cards/edlm-*/custom_generate
	find . -name .git -prune -o -name runs -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
