PYTHON ?= python3
VENV ?= .venv

.PHONY: setup demo demo-seg demo-video test lint

setup:  ## make $(VENV) with torch, the OpenMMLab stack and this package
	PYTHON=$(PYTHON) VENV=$(VENV) tools/misc/setup_env.sh

demo:  ## train and evaluate a small detector on generated images, on this machine
	$(VENV)/bin/python tools/demo.py

demo-seg:  ## the same for a small segmentor
	$(VENV)/bin/python tools/demo.py --task seg

demo-video:  ## the same for a small recognizer of motion
	$(VENV)/bin/python tools/demo.py --task video

test:  ## everything that needs no GPU, on all cores
	$(VENV)/bin/python -m pytest -m 'not gpu' -n auto --dist loadfile --no-loadscope-reorder --durations=10

lint:
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
