# Everything runs in .venv, which holds what requirements.lock names; a target builds it anew when it is missing or the lock changed.
PYTHON ?= python3
STABLE_VENV := .venv
STABLE_LOCK := requirements.lock
BIN := $(STABLE_VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check --no-input
UV := .venv-uv/bin/uv
export OMP_NUM_THREADS ?= 1
# Two more than there are cores, as many tests wait for processes of their own. A file, or a class, stays in one process, whose
# fixtures its tests share. A process that dies is not started again: each that follows would die of the same test.
WORKERS := 4
PYTEST := $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadscope --max-worker-restart 0

.PHONY: help venv lock quickstart test test-all test-newest test-oldest lint bench docs dist clean

help:
	@echo "make quickstart   install, train a GPT that collapses, alone, rescued and with σReparam, and show the result"
	@echo "make test         install, run the tests (make test-all: the slow ones too)"
	@echo "make test-newest  the same tests with the newest of everything, whatever the lock and upper bounds say"
	@echo "make test-oldest  the same tests with the lowest torch, timm and transformers that pyproject.toml allows"
	@echo "make lock         renew requirements.lock: the newest versions within pyproject.toml's bounds"
	@echo "make lint         ruff and formatting, as pre-commit runs them, and the types of core and monitor"
	@echo "make bench        step times, memory, scaling, attention, the monitor and build times, side by side (an hour)"
	@echo "make docs         the docs site: guides, methods, recipes and the API, with search"
	@echo "make dist         the sdist and the wheel, made of it and checked by twine, into dist"

venv: $(STABLE_VENV)/ready

# What the lock says of one package: the line that names it, and its hashes.
locked = sed -n '/^$(1)==/,/[^\\]$$/p' $(STABLE_LOCK)
INSTALL := install --progress-bar off --no-deps --no-build-isolation
CHECK := import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 13) else \
	f"Python 3.11 or 3.12 is needed, as ve-fairseq has no others; {v[0]}.{v[1]} found: make PYTHON=python3.12")

# torch is a CUDA build of several GB: 3 to 5 minutes the first time. Two packages have no wheels; the lock's own setuptools builds
# them. transformers' own tests for models are in its source distribution only; tests/hf_stable runs them on ours.
$(STABLE_VENV)/locked: $(STABLE_LOCK)
	@echo "== installing $(STABLE_LOCK) into $(STABLE_VENV) (a few minutes the first time)"
	@$(PYTHON) -c '$(CHECK)'
	@$(PYTHON) -m venv --clear $(STABLE_VENV)
	@$(call locked,setuptools) > $(STABLE_VENV)/setuptools.txt
	@$(call locked,transformers) > $(STABLE_VENV)/transformers.txt
	$(PIP) $(INSTALL) --require-hashes --requirement $(STABLE_VENV)/setuptools.txt
	$(PIP) $(INSTALL) --require-hashes --use-pep517 --requirement $(STABLE_LOCK)
	$(PIP) download --progress-bar off --no-deps --no-build-isolation --no-binary transformers --require-hashes \
		--requirement $(STABLE_VENV)/transformers.txt --dest $(STABLE_VENV)/upstream
	@touch $@

$(STABLE_VENV)/ready: $(STABLE_VENV)/locked pyproject.toml
	$(PIP) $(INSTALL) --editable .
	@touch $@
	@echo "== installed; next: make quickstart, or make test"

# uv makes locks. It asks the index that pip is configured for, within pip's own constraints; neither is written into the lock.
pip_setting = $$($(PYTHON) -m pip config list | sed -nE "s/^(:env:|global)\.$(1)='(.*)'/\2/p" | head -n 1)
INDEX = UV_DEFAULT_INDEX="$(call pip_setting,index-url)" UV_CONSTRAINT="$(call pip_setting,constraint)" \
	SSL_CERT_FILE="$${SSL_CERT_FILE:-$(call pip_setting,cert)}"
COMPILE = $(INDEX) $(UV) pip compile --quiet --extra all --upgrade --generate-hashes --no-annotate

$(UV):
	@$(PYTHON) -m venv .venv-uv
	@.venv-uv/bin/python -m pip install --quiet --disable-pip-version-check uv

lock: $(UV)
	$(COMPILE) --universal --python-version 3.11 --custom-compile-command "make lock" --output-file requirements.lock pyproject.toml
	@echo "== requirements.lock is renewed; next: make test"

quickstart: $(STABLE_VENV)/ready
	$(BIN)/python -m recipes.quickstart.run

test: $(STABLE_VENV)/ready
	$(PYTEST) -m "not slow"
	@echo "== tests passed; next: make test-all for the slow ones, make quickstart to see it train"

test-all: $(STABLE_VENV)/ready
	$(PYTEST)
	@echo "== all tests passed"

# Both make a lock of their own, anew each time.
test-newest: $(UV)
	@mkdir -p build/newest && sed -E 's/,<[0-9.]+//g' pyproject.toml > build/newest/pyproject.toml
	$(COMPILE) --python $(PYTHON) --output-file build/newest/requirements.lock build/newest/pyproject.toml
	$(MAKE) STABLE_VENV=.venv-newest STABLE_LOCK=build/newest/requirements.lock test

# What is not bounded from below is the newest here too.
test-oldest: $(UV)
	@mkdir -p build/oldest && grep -oE '(torch|timm|transformers)>=[0-9.]+' pyproject.toml | sort -u | sed 's/>=/==/' > build/oldest/lowest.txt
	$(COMPILE) --python $(PYTHON) --constraint build/oldest/lowest.txt --output-file build/oldest/requirements.lock pyproject.toml
	$(MAKE) STABLE_VENV=.venv-oldest STABLE_LOCK=build/oldest/requirements.lock test

lint: $(STABLE_VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STABLE_VENV)/ready
	for which in step_time memory scaling attention monitor build calls; do $(BIN)/python -m benchmarks.$$which || exit 1; done

docs: $(STABLE_VENV)/ready
	@$(BIN)/python docs/site/stage.py
	@$(BIN)/zensical build --strict --config-file build/mkdocs.yml
	@echo "== the site, with search, is build/site/index.html"

# Where the repository is, is said in setup.py; without it the metadata have no addresses.
dist: $(UV)
	@rm -rf dist
	@$(INDEX) $(UV) build --quiet --python $(PYTHON) --out-dir dist
	@$(INDEX) $(UV) tool run --quiet --python $(PYTHON) twine check --strict dist/*.whl dist/*.tar.gz
	@echo "== $$(ls dist)"

clean:
	rm -rf .venv .venv-* build dist *.egg-info
	@echo "== the environments are gone; runs/ is kept"
