# make demo   set everything up, train the quickstart (a few minutes on 2 cores), test it, draw its figures
# make test   set everything up, check the code, run the fast tests
# make test-all   also run the slow tests, as CI does

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
DEMO := runs/quickstart

.PHONY: demo test test-all lint format clean

demo: $(VENV)/demo-ready
	$(RUN) memorizing_associations_task.py --config configs/quickstart.yaml --output_dir $(DEMO) --resume auto
	$(RUN) memorizing_associations_task.py --resume $(DEMO)/model_best.pth.tar --evaluate
	$(RUN) plot_memorizing_associations_task.py --checkpoint_path $(DEMO)/model_best.pth.tar \
	    --metrics $(DEMO)/metrics.jsonl --output $(DEMO)/figures
	@echo "figures are in $(DEMO)/figures"

test: lint
	$(RUN) -m pytest -q -n 2 --dist loadfile

test-all: lint
	$(RUN) -m pytest -q -n 2 --dist loadfile -m "slow or not slow"

lint: $(VENV)/test-ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy models data utils memorizing_associations_task.py plot_memorizing_associations_task.py

format: $(VENV)/test-ready
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis

$(VENV)/demo-ready: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --requirement requirements.txt --constraint requirements-dev.txt
	touch $@

$(VENV)/test-ready: requirements-dev.txt $(VENV)/demo-ready
	$(RUN) -m pip install --quiet --requirement requirements.txt --requirement requirements-dev.txt
	touch $@
