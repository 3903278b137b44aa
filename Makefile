# Everything sets itself up: a virtual environment with the project and what it needs, then the command.
PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= dev
JAXSPARSE_CUDA ?= AUTO
DEMO_ARGS ?=
TEST_ARGS ?=

SOURCES := $(shell find cuda bindings -type f) CMakeLists.txt pyproject.toml
STAMP := $(VENV)/.installed
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check -q

.PHONY: demo test test-full lint clean

$(STAMP): $(SOURCES)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade pip
	JAXSPARSE_CUDA=$(JAXSPARSE_CUDA) $(PIP) install -e '.[$(EXTRAS)]'
	touch $@

demo: $(STAMP)  ## train the default scene and write the picture
	$(VENV)/bin/python examples/train_segmentation.py $(DEMO_ARGS)

test: $(STAMP)
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile $(TEST_ARGS)

test-full: $(STAMP)  ## the seeded sweeps too
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile -m '' $(TEST_ARGS)

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:
	rm -rf build dist out $(VENV) .venv-*
