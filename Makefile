PYTHON ?= python3
PIP     = .venv/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-all dropin docs lint bench clean

demo: .venv/installed
	.venv/bin/coadapt demo

test: lint
	OMP_NUM_THREADS=1 .venv/bin/pytest -q -n 2 -m "not full"

# What the laws of compositions draw is new each time; SEED=... draws it again.
test-all: SEED ?= $(shell .venv/bin/python -c 'import random; print(random.randrange(2**32))')
# With WHOLE=1 every method on every model in every way, which takes hours.
test-all: lint
	OMP_NUM_THREADS=1 .venv/bin/pytest -q -n 2 --hypothesis-seed=$(SEED)

# In an environment of its own, in which coadapt stands as peft (packages/peft/README.md).
dropin: .venv-dropin/installed .venv/installed-test
	.venv/bin/basedpyright -p packages/peft/pyproject.toml --pythonpath .venv-dropin/bin/python
	OMP_NUM_THREADS=1 .venv-dropin/bin/python -m pytest -q -c packages/peft/pyproject.toml packages/peft/tests

# The pages, into build/docs; a link that leads nowhere is an error.
docs: .venv/installed-test
	OMP_NUM_THREADS=1 .venv/bin/sphinx-build -q -W --keep-going -c docs . build/docs

lint: .venv/installed-test
	.venv/bin/ruff format --check
	.venv/bin/ruff check
	.venv/bin/basedpyright
	.venv/bin/basedpyright -p pyrightconfig.strict.json
	.venv/bin/lint-imports

# Needs two quiet cores for about 20 minutes. The table goes to benchmarks/results and docs/benchmarks.md.
bench: .venv/installed-test
	.venv/bin/python -m benchmarks --publish

clean:
	rm -rf .venv .venv-dropin build dist .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# pip is the last thing that venv installs, so its presence means a whole environment.
.venv/bin/pip:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "coadapt needs Python 3.11 or later; this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml constraints.txt | .venv/bin/pip
	$(PIP) -e .
	touch $@

.venv/installed-test: pyproject.toml constraints.txt | .venv/bin/pip
	$(PIP) -e '.[test]'
	touch .venv/installed $@

.venv-dropin/installed: pyproject.toml packages/peft/pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-dropin
	.venv-dropin/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt \
		-e . -e packages/peft diffusers pytest sentence-transformers trl
	touch $@
