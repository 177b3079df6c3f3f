# The verbs of CI and of a contributor. Each does its own set-up.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo table test test-thorough test-oldest check lint types pytest bench bench-gpu docs docs-serve clean

setup: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@echo "installing torch and the rest into $(VENV) (about 6 GB, a few minutes)"
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $(STAMP)

demo: setup
	$(BIN)/zoo demo

# Side by side: mypy has one core while the tests wait for what they started.
test: setup
	$(MAKE) --no-print-directory -j 2 lint types pytest

check: test

# The table of components in README.md, from the sheets in cards/.
table: setup
	$(BIN)/python docs/component_table.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

pytest: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Every case, the slow ones too (about twice the time): before a landing that touches pushing, the Hub or the command line.
test-thorough: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "thorough or not thorough"

# The same with the oldest torch and huggingface_hub that pyproject.toml allows, in an environment of its own.
test-oldest:
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet -e ".[dev]" "torch==2.11.*" "torchvision==0.26.*" "huggingface_hub==1.32.*"
	$(VENV)-oldest/bin/python -m pytest -n 2 --dist loadfile

bench: setup
	$(BIN)/python benchmarks/machine.py
	$(BIN)/python benchmarks/startup.py --rounds 3
	$(BIN)/python benchmarks/nd.py
	$(BIN)/python benchmarks/distillation.py --batch 128 --rounds 3 --steps 4
	$(BIN)/python benchmarks/contrastive.py --rounds 1 --sizes 4096 --largest 8192
	$(BIN)/python benchmarks/structure.py --rounds 1 --large 16384
	$(BIN)/python benchmarks/saliency.py --batch 4
	$(BIN)/python benchmarks/attacks.py --batch 32 --side 32
	$(BIN)/python benchmarks/recommender.py --rounds 1
	$(BIN)/python benchmarks/softrepa.py --rounds 1
	$(BIN)/python benchmarks/hub.py

bench-gpu: setup
	$(BIN)/python benchmarks/machine.py
	$(BIN)/python benchmarks/nd.py --device cuda
	$(BIN)/python benchmarks/distillation.py --device cuda --precision bf16-mixed
	$(BIN)/python benchmarks/contrastive.py --device cuda
	$(BIN)/python benchmarks/structure.py --device cuda
	$(BIN)/python benchmarks/saliency.py --device cuda
	$(BIN)/python benchmarks/attacks.py --device cuda
	$(BIN)/python benchmarks/recommender.py --device cuda
	$(BIN)/python benchmarks/softrepa.py --device cuda
	$(BIN)/python benchmarks/nd_table.py --preset gpu --out runs/nd-table-gpu

# The site: build/site/index.html. The variable silences an advertisement of the theme.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The same at http://127.0.0.1:8000, built anew when a page changes.
docs-serve: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve --strict

clean:
	rm -rf $(VENV) $(VENV)-oldest build dist runs *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
