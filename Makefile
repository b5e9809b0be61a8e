# `make demo` and `make test` need Python 3.11+ (with venv), git and make; they install the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Offline by default: nothing below may wait for a hub that is not needed.
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test test-long lint clean

$(VENV)/.installed: pyproject.toml constraints.txt setup.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,eval]'
	touch $@

# The main job on a built-in base: learns the sample subject and writes runs/demo/before_after.png.
# Fewer steps and pictures than mini-128's config has.
demo: $(VENV)/.installed
	rm -rf runs/demo
	$(BIN)/nora-dreambooth mini-128 --data.subject sample_data/subject --data.class_name flower \
	  --train.steps 120 --sample.n 2 --sample.steps 15 --output.dir runs/demo
	@echo "Look at runs/demo/before_after.png, then try your own photos:"
	@echo "  $(BIN)/nora-dreambooth mini-128 --data.subject FOLDER --data.class_name dog --output.dir runs/mine"

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2  # one thread a worker: two on two cores only wait

test-long: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow

clean:
	rm -rf $(VENV) runs build dist *.egg-info
