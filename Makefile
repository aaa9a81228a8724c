# make demo   the whole job on a laptop CPU, in a few minutes
# make test   lint, type check and the CPU test suite
# Both need nothing but Python 3.10 to 3.13 and the package index.
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
BIN := $(VENV)/bin
RUN := runs/demo

.PHONY: demo test lint clean

$(VENV)/ready: requirements.txt requirements-dev.txt constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -r requirements.txt -r requirements-dev.txt
	touch $@

$(RUN)/data/manifest.json: $(VENV)/ready
	mkdir -p $(RUN)
	$(BIN)/python data/demo_corpus.py --out $(RUN)/corpus.jsonl
	$(BIN)/python data/prepare.py $(RUN)/corpus.jsonl --out $(RUN)/data --train-tokenizer 1024 --val-fraction 0.04

$(RUN)/kg_blob.txt: $(RUN)/data/manifest.json data/kg_words.tsv
	$(BIN)/python tools/build_kg.py blob --tokenizer $(RUN)/data/tokenizer.model --out $@

demo: $(RUN)/kg_blob.txt
	RECIPE=demo $(BIN)/python train_gpt.py
	$(BIN)/python tools/demo_summary.py $(RUN)

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/basedpyright

test: lint
	$(BIN)/python -m pytest

clean:
	rm -rf $(VENV) runs
