# make demo   the whole job on a laptop CPU, in a few minutes, with a report of it: runs/demo/report.html
# make test   lint, type check and the CPU test suite
# Both need nothing but Python 3.10 to 3.13 and the package index.
# make audit-deps   known vulnerabilities of the pinned versions, where their list can be reached
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
BIN := $(VENV)/bin
RUN := runs/demo
PROGRAMS := train_gpt.py swarm_agents.py kg_data.py data tools bench

.PHONY: demo test lint audit-deps clean

REQUIREMENTS := requirements.txt requirements-tools.txt requirements-dev.txt

$(VENV)/ready: $(REQUIREMENTS) constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt $(REQUIREMENTS:%=-r %)
	touch $@

$(RUN)/data/manifest.json: $(VENV)/ready data/kg_words.tsv
	mkdir -p $(RUN)
	$(BIN)/python data/demo_corpus.py --out $(RUN)/corpus.jsonl
	$(BIN)/python data/prepare.py $(RUN)/corpus.jsonl --out $(RUN)/data --train-tokenizer 1024 --val-fraction 0.04 \
	  --overwrite

demo: $(RUN)/data/manifest.json
	RECIPE=demo $(BIN)/python train_gpt.py
	$(BIN)/python tools/demo_summary.py $(RUN)
	$(BIN)/python tools/sample.py --artifact $(RUN)/final_model.int6.ptz --tokenizer $(RUN)/data/tokenizer.model \
	  --prompt "The function" --tokens 40 --temperature 0.6
	@echo
	@echo "Your own text next: a file or a folder in the place of TEXT, ten minutes of training."
	@echo "    $(BIN)/python data/prepare.py TEXT --out data/mine --train-tokenizer 1024"
	@echo "    DATA_PATH=data/mine RECIPE=laptop $(BIN)/python train_gpt.py"

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/basedpyright
	$(BIN)/vermin --quiet --no-tips --violations --target=3.10- $(PROGRAMS)

test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

# Looks up one pinned version first: an index that has no vulnerability records must not pass for a clean bill.
audit-deps:
	@if ! $(PYTHON) -c "import json, urllib.request as request; pin = [line.split(';')[0].strip().split('==')[1] for line in \
	  open('constraints.txt') if line.startswith('numpy==')][0]; json.load(request.urlopen(\
	  f'https://pypi.org/pypi/numpy/{pin}/json', timeout=10))['vulnerabilities']" 2>/dev/null; then \
	  echo "audit-deps: SKIPPED, https://pypi.org has no record of the pinned versions from here"; else \
	  $(PYTHON) -m venv $(VENV)-audit && $(VENV)-audit/bin/python -m pip install --quiet pip-audit && \
	  $(VENV)-audit/bin/python -m pip_audit --strict --no-deps --disable-pip -r constraints.txt; fi

clean:
	rm -rf $(VENV) $(VENV)-audit $(RUN)
