# Everything that is done with this repository; `make` alone lists it.
# The distribution's Python, since only that one sees the distribution's bcc.
PYTHON ?= /usr/bin/python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(wildcard qpd tests bench)
SCRIPTS := scripts/in-guest scripts/run-tiers
SHELL_SCRIPTS := scripts/setup scripts/guest-kernel .ci/run $(wildcard deploy/containerlab/common/*.sh)
C_SOURCES := $(wildcard ebpf/*.[ch] bench/*.c tests/fabric/*.c)
# One tier of the tests (unit, ebpf, fabric, guest, container) or several in quotes; empty: all.
TIER ?=
# The packages that these tiers need; `unit` needs nothing but Python.
SETUP_GROUPS := run lab test $(if $(TIER),$(filter guest container,$(TIER)),guest container)

.DEFAULT_GOAL := help
.PHONY: help setup venv demo test bench bench-failover format clean lint lint-ruff lint-format lint-mypy lint-c lint-shell
.SUFFIXES:

help: ## say what can be done
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: | setup-demo venv ## fabric, traffic, qpd: the uplinks' shares without and with it, a cut, a return (root; sets itself up)
	$(BIN)/python -m qpd.lab.demo

test: | setup-test venv ## all tests, or one tier: make test TIER=unit|ebpf|fabric|guest|container (sets itself up)
	@scripts/run-tiers $(TIER)

bench: | setup-bench venv ## nanoseconds a packet, fabric throughput, memory, start time (root; make bench ARGS=--quick)
	$(BIN)/python -m bench $(ARGS)

bench-failover: | setup-bench venv ## outages of cut and silently lost links without and with qpd (root; ARGS=--quick or --stress)
	$(BIN)/python -m bench.failover $(ARGS)

lint: lint-ruff lint-format lint-mypy lint-c lint-shell ## ruff, mypy, clang-format, shellcheck (--keep-going for all that is wrong)

lint-ruff: | venv
	$(BIN)/ruff check . $(SCRIPTS)

lint-format: | venv
	$(BIN)/ruff format --check . $(SCRIPTS)

# Each script is a main module of its own, so each is checked apart.
lint-mypy: | venv
	$(BIN)/mypy $(SOURCES)
	for script in $(SCRIPTS); do $(BIN)/mypy $$script || exit 1; done

lint-c:
	$(if $(C_SOURCES),clang-format --dry-run -Werror $(C_SOURCES))

lint-shell:
	shellcheck $(SHELL_SCRIPTS)

format: | venv ## bring Python and C into the style that lint asks for
	$(BIN)/ruff check --fix-only . $(SCRIPTS)
	$(BIN)/ruff format . $(SCRIPTS)
	$(if $(C_SOURCES),clang-format -i $(C_SOURCES))

setup: ## install the distribution packages that are missing, mount bpffs (root)
	@scripts/setup run lab test guest container

venv: $(VENV)/.installed ## make the Python environment .venv

clean: ## remove .venv, build/ and caches
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find qpd tests bench -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

.PHONY: setup-demo setup-test setup-bench
setup-demo setup-bench:
	@scripts/setup run lab

setup-test:
	@$(if $(filter-out unit,$(or $(TIER),all)),scripts/setup $(SETUP_GROUPS),true)

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "make venv: $(PYTHON) cannot make environments: install python3-venv, or run 'make setup' as root" >&2; exit 1; }
	$(PYTHON) -m venv --system-site-packages $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --retries 10 --editable '.[lab,dev]'
	@touch $@
