# Everything runs in .venv, which `make venv` builds; the other targets build it when it is missing or out of date.
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1

.PHONY: help venv quickstart test test-all lint bench docs clean

help:
	@echo "make quickstart   install, train an 18L-18L translation model four ways on the CPU, show the result"
	@echo "make test         install, run the tests (make test-all: the slow ones too)"
	@echo "make lint         ruff and formatting, as pre-commit runs them"
	@echo "make bench        step times, memory, scaling, attention, the monitor and build times, side by side (an hour)"
	@echo "make docs         the API reference, from the docstrings, into docs/api"

venv: .venv/ready

# torch is a CUDA build of several GB: 3 to 5 minutes the first time.
.venv/ready: pyproject.toml
	@echo "== installing into .venv (a few minutes the first time)"
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"Python 3.11 or later is needed, {v[0]}.{v[1]} found: make PYTHON=python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --progress-bar off --disable-pip-version-check -e '.[all]'
	@# ve-fairseq brings torchaudio, whose newest release does not import beside the newest torch, and then transformers does not.
	$(BIN)/python -m pip uninstall --quiet --yes torchaudio
	@# transformers' own tests for models are in its source distribution only; tests/hf_stable runs them on ours.
	$(BIN)/python -m pip download --quiet --progress-bar off --disable-pip-version-check --no-deps --no-binary transformers \
		--dest .venv/upstream "transformers==$$($(BIN)/python -c 'from importlib.metadata import version; print(version("transformers"))')"
	@touch $@
	@echo "== installed; next: make quickstart, or make test"

quickstart: .venv/ready
	$(BIN)/python -m recipes.quickstart.quickstart

test: .venv/ready
	$(BIN)/python -m pytest -q -m "not slow"
	@echo "== tests passed; next: make test-all for the slow ones, make quickstart to see it train"

test-all: .venv/ready
	$(BIN)/python -m pytest -q
	@echo "== all tests passed"

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: .venv/ready
	for which in step_time memory scaling attention monitor build; do $(BIN)/python -m benchmarks.$$which || exit 1; done

# pdoc imports what a package's __all__ names. There is a command stable_core.fold, which would take the place of the function.
PDOC := import stable_core.fold; stable_core.fold = stable_core.folding.fold; from pdoc.__main__ import cli; cli()
PACKAGES := stable_core stable_monitor fairseq_sigma timm_stable hf_stable nanogpt_patch

docs: .venv/ready
	@rm -rf docs/api
	@$(BIN)/python -W ignore -c '$(PDOC)' --docformat google --output-directory docs/api $(PACKAGES)
	@echo "== the API reference is docs/api/index.html"

clean:
	rm -rf .venv build *.egg-info
	@echo "== .venv is gone; runs/ is kept"
