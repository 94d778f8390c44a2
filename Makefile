# Everything is in start.py, which also works where there is no make: `python start.py lab`.
# Options go in ARGS:  make test ARGS="-k lora -x"

PYTHON ?= python3
VENV_PYTHON = .venv/bin/python

.PHONY: lab test setup build bench

lab:
	$(PYTHON) start.py lab $(ARGS)

test:
	$(PYTHON) start.py test $(ARGS)

setup:
	$(PYTHON) start.py setup

build: setup
	$(VENV_PYTHON) -m peft_teach.cli build $(ARGS)

bench: setup
	$(VENV_PYTHON) -m benchmarks $(ARGS)
