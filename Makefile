# `make app` and `make test` do all the set-up themselves, in .venv. Python compiles what is imported on first use, and
# keeps it, whatever the environment says: each process of the tests would compile it again.
export PYTHONDONTWRITEBYTECODE :=
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= $(shell $(PYTHON) -c "import os; print(min(6, os.cpu_count()))")

.PHONY: app test check audit

app: $(VENV)/app.stamp
	$(BIN)/python app.py

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not browser"
	$(BIN)/python -m pytest -n auto --maxprocesses 2 --dist worksteal -m browser

check: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/bandit -q -c pyproject.toml -r app modification app.py

audit: $(VENV)/test.stamp
	$(BIN)/pip install --quiet pip-audit
	$(BIN)/pip-audit -r requirements.txt

$(VENV)/app.stamp: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile -r requirements.txt
	touch $@

$(VENV)/test.stamp: $(VENV)/app.stamp requirements-test.txt
	$(BIN)/pip install --quiet --no-compile -r requirements-test.txt
	touch $@
