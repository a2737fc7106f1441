# Three commands, each of which sets itself up in .venv on a fresh machine.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: browser demo docs test

demo: .venv/ready
	@mkdir -p demo
	$(BIN)/musigma train vae mnist-5k --conditional --binarize threshold --net mlp \
	    --latents 10 --prior flow --minutes 0.5 --patience 3 --out demo/vae --overwrite
	$(BIN)/musigma train glow mnist-5k --conditional --hidden 64 --depth 6 --batch-size 32 \
	    --minutes 2.1 --patience 3 --out demo/glow --overwrite
	@$(BIN)/musigma sample demo/glow --temperatures 0.6,0.8,1 --n 20 --out demo/temperatures.png
	@$(BIN)/python examples/demo/page.py temperatures demo
	@$(BIN)/python examples/demo/page.py table demo
	$(BIN)/musigma train maf demo/tumors.csv --hidden 64 --depth 3 --ema 0.95 \
	    --optimizer adamw --weight-decay 0.1 --epochs 60 --evaluations 20 --patience 3 \
	    --out demo/tumors --overwrite
	@$(BIN)/musigma score demo/tumors demo/tumors.csv --out demo/scores.csv
	@$(BIN)/python examples/demo/page.py rows demo
	@$(BIN)/python examples/demo/page.py audit demo
	@$(BIN)/musigma compress demo/glow mnist-5k demo/digits.mus --split held-out --json \
	    > demo/compress-glow.json
	@$(BIN)/python examples/demo/page.py compression demo
	@$(BIN)/musigma report demo/vae demo/glow demo/tumors --section demo/temperatures.json \
	    --section demo/rows.json --section demo/audit.json --section demo/compression.json \
	    --title "musigma: demo" --out demo/index.html

docs: .venv/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

test: docs browser
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

# Debian's chromium, for tests of the page of `musigma explore`; without it they are skipped.
browser:
	@command -v chromium > /dev/null || { test "$$(id -u)" = 0 && command -v apt-get > /dev/null \
	    && apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium; \
	    } > /dev/null 2>&1 \
	    || echo "no chromium, and it could not be installed: tests in a browser are skipped"

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@
