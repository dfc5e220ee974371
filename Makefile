# Everything runs in .venv, which scripts/bootstrap.sh makes; or in the interpreter named by WALLFACER_PYTHON, as it is.
INTERPRETER := $(or $(WALLFACER_PYTHON),.venv/bin/python)
# The commands of an environment lie beside its interpreter.
WALLFACER := $(dir $(INTERPRETER))wallfacer
# Ranks and commands are started hundreds of times: what one of them compiles is there for the next.
export PYTHONDONTWRITEBYTECODE :=
# More arguments for demo and test: make test ARGS="-k ring -x"
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help bootstrap demo test composition versions docs pages figures lint clean

help: ## list these targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | while IFS="$$(printf '\t')" read -r name what; do \
		printf '  make %-10s %s\n' "$$name" "$$what"; done

bootstrap: ## make .venv with all that is needed; at once when it is there
	@scripts/bootstrap.sh

demo: bootstrap ## train a small GPT on CPU ranks, with and without the plugin, and compare
	@$(WALLFACER) demo $(ARGS)

# Two files at a time, on two cores; who measures is alone (tests/support/machine.py). ARGS="-n 0" for one after the other.
test: bootstrap ## run the tests
	@$(INTERPRETER) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

composition: bootstrap ## train every pair of features with and without the plugin, and compare (45 minutes)
	@$(INTERPRETER) -m tests.composition $(ARGS)

versions: bootstrap ## try every Megatron version that is supported, and compare with docs/compatibility.md
	@$(INTERPRETER) -m scripts.versions --check docs/compatibility.md $(ARGS)

docs: bootstrap ## build the documentation as a site in docs/_build/html
	@$(INTERPRETER) -m sphinx -W --keep-going -q -b html docs docs/_build/html $(ARGS)

pages: bootstrap ## write the generated parts of the documentation
	@$(INTERPRETER) -m scripts.pages $(ARGS)

figures: bootstrap ## draw the pictures of the documentation
	@$(INTERPRETER) -m scripts.figures $(ARGS)

lint: bootstrap ## check style and format
	@$(INTERPRETER) -m ruff check
	@$(INTERPRETER) -m ruff format --check

clean: ## remove caches and build leftovers; .venv, a big download, stays
	@rm -rf build dist docs/_build *.egg-info .pytest_cache .ruff_cache .hypothesis
	@find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
