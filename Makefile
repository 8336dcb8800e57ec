.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.csdiff-installed
export HF_HUB_OFFLINE ?= 1
export HF_HUB_DISABLE_TELEMETRY ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help setup demo test quality style docs bench assets clean

help: ## Show this list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-9s %s\n", $$1, $$2}'

setup: $(STAMP) ## Make .venv and install csdiff with its development tools

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $(STAMP)

demo: setup ## Train an adapter on the shipped data and draw four prompts (a few minutes)
	$(BIN)/csdiff train --config configs/tiny.yaml --output_dir runs/demo --resume never
	$(BIN)/python generate.py --adapter runs/demo --output outputs/demo --seed 0 \
		--prompt "a laughing face with tears, noto style" --prompt "a ringing alarm clock, noto style" \
		--prompt "a blue butterfly, flat style" --prompt "a glass of red wine, 3d style"
	@echo "The adapter is in runs/demo, the pictures are in outputs/demo (start with outputs/demo/grid.png)."

test: setup ## Run the tests, on two cores
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

quality: setup ## Check lint and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: setup ## Fix lint and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup ## Build the documentation into site/, refusing broken links
	$(BIN)/mkdocs build --strict

bench: setup ## Run the benchmarks in their quick form and print their tables
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[bench]"
	for script in losses prior store training; do $(BIN)/python benchmarks/$$script.py --quick || exit 1; done

assets: setup ## Rebuild assets/ from its public sources (15 minutes on a GPU, days on a CPU; QUICK=FOLDER tries it there)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[assets]"
	$(BIN)/python scripts/build_assets.py $(if $(QUICK),--quick $(QUICK))

clean: ## Remove what runs, builds and tests leave behind
	rm -rf runs outputs build dist site .pytest_cache .ruff_cache .hypothesis
