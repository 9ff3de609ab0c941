# Two commands for a fresh machine: `make run` and `make test`. Everything lives in .venv.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
PROMPTS := "a red circle to the left of a blue star" "a yellow star above a purple ring" "three green rings" \
	"a white cross" "a blue ring and a red star" "four orange squares"
EMOJI := "cat with tears of joy, noto" "four leaf clover, glossy" "rocket, twemoji" "tiger face, flat" "pizza, blob" \
	"hot beverage, noto"

.PHONY: help run serve install test test-slow lint format docs clean

help:
	@echo "make run        install, then paint pictures with the shipped models, and what each word painted, into out/"
	@echo "make serve      install, then serve the page: type a prompt, watch it being painted, touch its words"
	@echo "make test       install, then run the tests"
	@echo "make test-slow  the tests that take minutes to hours"
	@echo "make lint       formatting, lint, types, levels of the architecture"
	@echo "make format     format the code"
	@echo "make docs       the site, into site/: open site/index.html"

run: .venv/installed
	$(BIN)/gobelin generate $(PROMPTS) --seed 1 --out out --maps
	$(BIN)/gobelin generate $(EMOJI) --model emoji --seed 1 --out out/emoji --maps

serve: .venv/installed
	$(PIP) --editable '.[server]'
	$(BIN)/gobelin serve

test: .venv/installed-dev
	$(BIN)/pytest -n auto --dist worksteal

test-slow: .venv/installed-dev
	$(BIN)/pytest -m slow

lint: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/oxlint --deny-warnings src
	$(BIN)/pyright
	$(BIN)/lint-imports

format: .venv/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: .venv/installed-dev
	$(BIN)/python scripts/site/pages.py docs/reference
	$(BIN)/zensical build --strict

install: .venv/installed

# TORCH_INDEX may name an index that has CPU builds of torch, which are smaller: --index-url URL
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear .venv
	$(PIP) torch $(TORCH_INDEX)
	$(PIP) --editable .
	touch $@

.venv/installed-dev: .venv/installed
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps open_clip_torch # for CLIP's vocabulary, which tests read
	-$(BIN)/python -c 'from gobelin.static_page import find_runtime; find_runtime()' # by npm, for the tests of the page
	touch $@

clean:
	rm -rf .venv out build dist site docs/reference .cache .pytest_cache .ruff_cache
