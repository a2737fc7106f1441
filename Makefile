# Two commands, each of which sets itself up in .venv on a fresh machine.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test

demo: .venv/ready
	OMP_WAIT_POLICY=passive $(BIN)/musigma train vae digits --minutes 1 --out demo/vae --overwrite
	OMP_WAIT_POLICY=passive $(BIN)/musigma train glow digits --minutes 1.25 --out demo/glow --overwrite
	@echo "On the test images that neither model has seen:"
	@printf "  vae:  " && $(BIN)/musigma evaluate demo/vae digits --k 100
	@printf "  glow: " && $(BIN)/musigma evaluate demo/glow digits --k 100
	@$(BIN)/musigma report demo/vae demo/glow --out demo/index.html --title "musigma: digits"

test: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@
