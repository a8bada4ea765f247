# make demo        install into .venv and run the demo study (DATA=fashion_mnist, cifar10, or a folder)
# make dashboard   look at the studies in saved_models/
# make test        install and run the checks and the tests; make test-slow adds those that take minutes
# make baselines   train the shipped baselines again (hours; CIFAR10=cifar10 or a folder)

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do command -v $$p >/dev/null 2>&1 && \
  $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null && echo $$p && break; done)
DATA ?= fashion_mnist
STUDY ?= saved_models
CIFAR10 ?= cifar10
BIN := .venv/bin
# Two files of tests at a time; a file's tests in their order, since many share what is costly to make.
TOGETHER := -n 2 --dist loadfile
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo dashboard test test-slow lint baselines install clean

demo: .venv/.installed
	$(BIN)/tfopt demo --data '$(DATA)'

dashboard: .venv/.installed
	$(BIN)/python -m dashboard '$(STUDY)'

test: .venv/.tested lint
	$(BIN)/python -m pytest $(TOGETHER)

test-slow: .venv/.tested lint
	$(BIN)/python -m pytest $(TOGETHER) -m 'slow or not slow'

lint: .venv/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

install: .venv/.installed

.venv/.installed: requirements.txt constraints.txt pyproject.toml
	@test -n '$(PYTHON)' || { echo 'tfopt needs Python 3.11, 3.12 or 3.13: install one, or say make PYTHON=/path/to/python'; exit 2; }
	@$(PYTHON) -m venv .venv || { echo 'This Python cannot make a virtual environment: on Debian, apt install python3-venv'; exit 2; }
	$(PIP) install --quiet --progress-bar on -r requirements.txt -c constraints.txt
	$(PIP) install --quiet --no-deps -e .
	@touch $@

.venv/.tested: .venv/.installed
	$(PIP) install --quiet -e '.[test]' -c constraints.txt
	@touch $@

# The commands stand on the model cards too; each takes up to an hour on two cores.
baselines: .venv/.installed
	$(BIN)/tfopt train resnet8 --data fashion_mnist --train epochs=15 --force --out saved_models/baselines/resnet8-fashion
	$(BIN)/tfopt train mobilenet --width 0.25 --data fashion_mnist --train epochs=15 --force --out saved_models/baselines/mobilenet-fashion
	$(BIN)/tfopt train resnet8 --data '$(CIFAR10)' --train epochs=40 --force --out saved_models/baselines/resnet8-cifar10-jpeg
	$(BIN)/tfopt train mobilenet --width 0.25 --data '$(CIFAR10)' --train epochs=40 --force --out saved_models/baselines/mobilenet-cifar10-jpeg

clean:
	rm -rf .venv build dist *.egg-info
