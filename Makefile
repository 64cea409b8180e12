# `make` lists the targets. Each makes .venv when it is missing, and installs again only when one of the
# files below has changed since.
VENV := .venv
BIN  := $(VENV)/bin
PINS := settings.ini setup.py pyproject.toml constraints.txt

# The first Python on the PATH that is new enough; PYTHON=... chooses another.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo "$$p" && break; done)

PIP     = $(BIN)/python -m pip install --disable-pip-version-check $$([ -t 2 ] || echo --quiet) -c constraints.txt
IN_VENV = PATH="$(CURDIR)/$(BIN):$$PATH"

.DEFAULT_GOAL := help
.PHONY: help train test lab export clean-notebooks readme pictures install

help: ## list these targets
	@echo 'make TARGET, where TARGET is one of'
	@sed -n 's/^\([a-z-]*\):.*## /\1 /p' $(MAKEFILE_LIST) | while read -r target does; do printf '  %-16s %s\n' "$$target" "$$does"; done

train: $(VENV)/.base ## train a GPT on tiny Shakespeare, with a preset that suits this machine (ARGS="--max-iters 100" ...)
	@$(BIN)/nanogpt train $(ARGS) || case $$? in 130|143) ;; *) exit 1;; esac # stopped is no error

test: $(VENV)/.full ## lint, run the notebooks and the tests (SLOW=1: the slow ones too; ARGS="-k tokenizer": pytest's)
	@$(IN_VENV) $(BIN)/python tests/run_all.py $(if $(filter-out 0,$(SLOW)),--slow) $(ARGS)

lab: $(VENV)/.full ## open JupyterLab on the notebooks
	@$(IN_VENV) $(BIN)/jupyter-lab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/nbs $(ARGS)

export: $(VENV)/.full ## write the modules from the notebooks
	@$(IN_VENV) $(BIN)/nbdev_export

clean-notebooks: $(VENV)/.full ## strip what a notebook's diff does not need; outputs stay
	@$(IN_VENV) $(BIN)/nbdev_clean

readme: $(VENV)/.full ## write README.md from nbs/index.ipynb
	@$(BIN)/python nbs/_readme.py

pictures: $(VENV)/.full ## make the README's pictures, from a real JupyterLab in a few minutes (needs Chromium)
	@$(IN_VENV) $(BIN)/python tests/pictures.py

install: $(VENV)/.full ## only install: the package, JupyterLab and what development needs

$(VENV)/.base: $(PINS) | $(BIN)/python
	@echo 'Installing nanogpt_nb into $(VENV); PyTorch is the large part.'
	@$(PIP) -e .
	@touch $@

$(VENV)/.full: $(PINS) | $(BIN)/python
	@echo 'Installing nanogpt_nb, JupyterLab and the tools for development into $(VENV).'
	@$(PIP) -e '.[lab,dev]'
	@touch $(VENV)/.base $@

$(BIN)/python:
	@[ -n '$(PYTHON)' ] || { echo 'No Python 3.10 or newer is on the PATH; install one, or say where it is: make PYTHON=/path/to/python3' >&2; exit 1; }
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "$(PYTHON) is not Python 3.10 or newer: $$('$(PYTHON)' --version 2>&1); choose another with make PYTHON=..." >&2; exit 1; }
	@'$(PYTHON)' -m venv --clear $(VENV) || { rm -rf $(VENV); \
		echo 'That Python cannot make a virtual environment. On Debian and Ubuntu: sudo apt-get install python3-venv' >&2; exit 1; }
