# Two commands do all the set-up: `make demo` and `make test`. Both create .venv and install what they need.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help demo test quick long docs examples lint types mutants zoo bench release-check clean
.DEFAULT_GOAL := help

help:  ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(PY):
	$(PYTHON) -m venv $(VENV)

# torch is installed by name first: with the pin satisfied, no other package pulls a different build.
$(VENV)/.torch: $(PY) constraints.txt
	@echo "installing torch into $(VENV) (once, about a minute)"
	$(PIP) torch
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	@echo "installing coreprune with what its demo needs"
	$(PIP) -e '.[demo]'
	@touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml
	@echo "installing coreprune with its test tools"
	$(PIP) -e '.[demo,docs,test]'
	@touch $@

$(VENV)/.bench: $(VENV)/.test
	$(PIP) -e '.[bench]'
	@touch $@

$(VENV)/.release: $(VENV)/.torch pyproject.toml
	$(PIP) -e '.[release]'
	@touch $@

# The tests of the report look at it in a browser; as root, Debian's package is installed where there is none.
BROWSERS := chromium chromium-browser google-chrome chrome
$(VENV)/.browser: $(VENV)/.test
	@for name in $(BROWSERS); do command -v $$name >/dev/null && touch $@ && exit 0; done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "installing chromium for the tests of the report"; \
		apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends chromium \
			>/dev/null && touch $@ && exit 0; \
	fi; \
	echo "no chromium on the PATH: the browser tests will be skipped"

demo: $(VENV)/.demo  ## train a small network, prune it in eight ways, write a report
	$(VENV)/bin/coreprune demo

test: lint types $(VENV)/.test $(VENV)/.browser  ## lint, types, import direction, all tests (they build the docs too)
	$(PY) -m pytest -n auto --dist worksteal

quick: $(VENV)/.test  ## the fast tests (under a minute)
	$(PY) -m pytest -n auto --dist worksteal -m "not slow and not long"

long: $(VENV)/.test  ## the long sweeps that `make test` runs a part of (some minutes)
	$(PY) -m pytest -n auto --dist worksteal -m long

docs: $(VENV)/.test  ## the site with the tutorial, the guides and the reference, in build/site; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet --strict
	@echo "$(CURDIR)/build/site/index.html"

lint: $(VENV)/.test  ## style and import direction
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports

types: $(VENV)/.test  ## static types
	$(VENV)/bin/pyright

mutants: $(VENV)/.test  ## plant faults in copies of the library, one at a time: the tests must notice each (half an hour)
	PYTHONPATH=tests:benchmarks $(PY) -m mutants.run --jobs 2 $(only)

bench: $(VENV)/.bench  ## the ellipsoid benchmark (LeNet needs --data, see benchmarks/lenet_mnist.py)
	$(PY) benchmarks/mvee.py
	$(PY) benchmarks/page.py

examples: $(VENV)/.test  ## run the notebooks of examples/ again, and store what they print
	$(PY) examples/run.py

# These packages need another torch than the tests: several GB.
ZOO := build/zoo-env
$(ZOO)/.done: pyproject.toml
	$(PYTHON) -m venv $(ZOO)
	$(ZOO)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.14.1 torchvision==0.29.1 \
		timm ultralytics segmentation-models-pytorch torch-pruning==1.6.1 transformers
	$(ZOO)/bin/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

zoo: $(ZOO)/.done  ## prune some 180 architectures of five packages, and look whether the results are right (hours)
	$(ZOO)/bin/python benchmarks/zoo.py
	$(ZOO)/bin/python benchmarks/page.py

release-check: $(VENV)/.release  ## build wheel and source distribution, and try the wheel in an empty environment
	rm -rf build/dist
	$(PY) -m build --outdir build/dist
	$(VENV)/bin/twine check --strict build/dist/*
	$(PY) .ci/try_wheel.py build/dist

clean:  ## remove the environment and every cache
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis .import_linter_cache build demo-report
