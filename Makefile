# Two commands matter: `make demo` and `make test`. Each makes .venv first if it is not there.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo test test-deps test-gpu test-slow

install: .venv/.installed

.venv/.installed: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	@touch $@
	@echo "installed: $(BIN)/rnnq"

demo: install
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash workers/demo.sh

# two at once, a file each: most tests wait for processes
test: install
	@$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

test-slow: install
	@$(BIN)/python -m pytest -m slow $(ARGS)

# on a machine with a GPU; without one every test fails, as one that is skipped has shown nothing
test-gpu: install
	@RNNQ_NO_SKIP=1 $(BIN)/python -m pytest -m gpu $(ARGS)

# What the tests need beyond Python. A PostgreSQL server comes with the packages of dev, where there is one to install.
test-deps: install
	@$(BIN)/python -c "from tests import postgres; print('PostgreSQL:', postgres.programs() or exit('none: see PG_BIN'))"
