# Everything runs in .venv, which `make venv` builds; the other targets build it when it is missing or out of date.
PYTHON ?= python3
STABLE_VENV := .venv
BIN := $(STABLE_VENV)/bin
export OMP_NUM_THREADS ?= 1

.PHONY: help venv quickstart test test-all test-oldest lint bench docs clean

help:
	@echo "make quickstart   install, train an 18L-18L translation model four ways on the CPU, show the result"
	@echo "make test         install, run the tests (make test-all: the slow ones too)"
	@echo "make test-oldest  the same tests with the lowest torch, timm and transformers that pyproject.toml allows"
	@echo "make lint         ruff and formatting, as pre-commit runs them"
	@echo "make bench        step times, memory, scaling, attention, the monitor and build times, side by side (an hour)"
	@echo "make docs         the API reference, from the docstrings, into docs/api"

venv: $(STABLE_VENV)/ready

# torch is a CUDA build of several GB: 3 to 5 minutes the first time.
$(STABLE_VENV)/ready: pyproject.toml
	@echo "== installing into $(STABLE_VENV) (a few minutes the first time)"
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"Python 3.11 or later is needed, {v[0]}.{v[1]} found: make PYTHON=python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(STABLE_VENV)
	$(BIN)/python -m pip install --quiet --progress-bar off --disable-pip-version-check -e '.[all]'
	@# ve-fairseq brings torchaudio, whose newest release does not import beside the newest torch, and then transformers does not.
	$(BIN)/python -m pip uninstall --quiet --yes torchaudio
	@# transformers' own tests for models are in its source distribution only; tests/hf_stable runs them on ours.
	$(BIN)/python -m pip download --quiet --progress-bar off --disable-pip-version-check --no-deps --no-binary transformers \
		--dest $(STABLE_VENV)/upstream "transformers==$$($(BIN)/python -c 'from importlib.metadata import version; print(version("transformers"))')"
	@touch $@
	@echo "== installed; next: make quickstart, or make test"

quickstart: $(STABLE_VENV)/ready
	$(BIN)/python -m recipes.quickstart.quickstart

test: $(STABLE_VENV)/ready
	$(BIN)/python -m pytest -q -m "not slow"
	@echo "== tests passed; next: make test-all for the slow ones, make quickstart to see it train"

test-all: $(STABLE_VENV)/ready
	$(BIN)/python -m pytest -q
	@echo "== all tests passed"

# What is not bounded from below is the newest here too.
test-oldest:
	@mkdir -p .venv-oldest
	@grep -oE '(torch|timm|transformers)>=[0-9.]+' pyproject.toml | sort -u | sed 's/>=/==/' > .venv-oldest/lowest.txt
	PIP_CONSTRAINT=.venv-oldest/lowest.txt $(MAKE) STABLE_VENV=.venv-oldest venv
	$(MAKE) STABLE_VENV=.venv-oldest test

lint: $(STABLE_VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(STABLE_VENV)/ready
	for which in step_time memory scaling attention monitor build calls; do $(BIN)/python -m benchmarks.$$which || exit 1; done

PACKAGES := stable_core stable_monitor fairseq_sigma timm_stable hf_stable nanogpt_patch

docs: $(STABLE_VENV)/ready
	@rm -rf docs/api
	@$(BIN)/python -W ignore -m pdoc --docformat google --output-directory docs/api $(PACKAGES)
	@echo "== the API reference is docs/api/index.html"

clean:
	rm -rf .venv .venv-oldest build *.egg-info
	@echo "== the environments are gone; runs/ is kept"
