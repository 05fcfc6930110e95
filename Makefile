PYTHON ?= python3
VENV ?= .venv

PYTEST = $(VENV)/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder --durations=10

.PHONY: setup demo demo-seg demo-video demo-cls test test-all lint docs

setup:  ## make $(VENV) with torch, the OpenMMLab stack and this package
	PYTHON=$(PYTHON) VENV=$(VENV) tools/misc/setup_env.sh

demo:  ## train and evaluate a small detector on generated images, on this machine
	$(VENV)/bin/python tools/demo.py

demo-seg:  ## the same for a small segmentor
	$(VENV)/bin/python tools/demo.py --task seg

demo-video:  ## the same for a small recognizer of motion
	$(VENV)/bin/python tools/demo.py --task video

demo-cls:  ## pre-train on digits without labels by SimMIM, then fine-tune a classifier on a few labelled ones
	$(VENV)/bin/python tools/demo_cls.py

test:  ## what every change has to pass, on all cores; ARGS=tests/test_ops takes a part of it
	$(PYTEST) -m 'not slow and not gpu' $(ARGS)

test-all:  ## that and all that is slow: see docs/testing.md for its parts
	$(PYTEST) -m 'not gpu' $(ARGS)

lint:
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# the variable switches off mkdocs-material's notice about MkDocs 2
docs:  ## the manual as a web site: site/index.html
	$(VENV)/bin/python -c 'import material, mkdocstrings_handlers.python' 2>/dev/null || \
		$(VENV)/bin/python -m pip install --quiet --editable '.[docs]' 'setuptools<81'
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict
