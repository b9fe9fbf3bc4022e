# Two commands for a new user: `make demo` and `make test`. Each makes .venv and installs what it needs.
PYTHON ?= python3
VENV   ?= .venv
# A plain version, so that a CPU build of torch is taken where the package index offers one.
TORCH  ?= torch==2.13.0
RUN    := $(VENV)/bin/python

.PHONY: demo test lint quick clean

demo: $(VENV)/.installed
	$(RUN) examples/demo.py

test: lint quick
	$(RUN) -m pytest -m slow

quick: lint
	$(RUN) -m pytest -m "not slow"

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

$(VENV)/.installed: setup.py
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q "$(TORCH)"
	$(VENV)/bin/pip install -q -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) dist build *.egg-info
