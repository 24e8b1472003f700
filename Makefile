# `make demo` and `make test` work on a fresh clone: they create .venv first.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
MODEL ?=
PART ?=
SEED ?=
SERVE_ARGS ?= --topology split --expert-shards 2
FOLDERS := kernels model cluster deploy benchmarks

.PHONY: help install demo serve test verify chaos check schema bench kernels gpu-test gpu-bench gpu-engine gpu-gang monitoring lock clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# pip from 26.2 on is not yet tested with this lock file.
$(STAMP): pyproject.toml setup.py requirements.lock
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet 'pip>=25,<26.2' 'setuptools>=80' wheel
	$(BIN)/python -m pip install --quiet --no-build-isolation -c requirements.lock -e '.[test]'
	touch $@

install: $(STAMP) ## create .venv with the locked versions

$(VENV): $(STAMP)

demo: $(STAMP) ## start a split cluster on this machine, ask it a question, have it call a tool, stop it
	$(BIN)/python -m divisi.deploy.demo

serve: $(STAMP) ## serve MODEL=DIR (the demo model where none is given)
	$(BIN)/divisi serve $(MODEL) $(SERVE_ARGS)

# Two processes, for two cores: tests/side_by_side.py says what runs beside what.
test: $(STAMP) ## the quick, seeded tier
	$(BIN)/pytest -m "not verify" -n 2 --dist loadscope --no-loadscope-reorder

verify: $(STAMP) ## everything, or PART=faults, step, ... (tests/parts.py), with results in tests/results/
	$(BIN)/pytest --verify $(if $(PART),--part=$(PART))

chaos: $(STAMP) ## 50 random blows on a running server, every answer judged (SEED=N for a known plan, COPIES=1 for copies of the experts), 8 minutes
	$(BIN)/python -m tests.e2e.chaos $(if $(SEED),--seed $(SEED)) $(if $(COPIES),--copies $(COPIES)) --out tests/results

check: $(STAMP) build/typecheck ## ruff and mypy
	$(BIN)/python -m ruff --version >/dev/null 2>&1 || $(BIN)/python -m pip install --quiet --no-build-isolation -c requirements.lock -e '.[test,dev]'
	$(BIN)/ruff check .
	$(BIN)/mypy $(foreach folder,$(FOLDERS),-p divisi.$(folder))
	MYPYPATH=k8s:build/typecheck $(BIN)/mypy k8s/make_schema.py

schema: $(STAMP) ## rewrite the chart's values.schema.json and its table of values, from the settings
	$(BIN)/python k8s/make_schema.py

build/typecheck:
	mkdir -p $@/divisi
	for folder in $(FOLDERS); do ln -sfn "$(CURDIR)/$$folder" "$@/divisi/$$folder"; done

bench: $(STAMP) ## the speed tables of benchmarks/README.md: the engine, a server over HTTP
	$(BIN)/python -m pip install --quiet --no-build-isolation -c requirements.lock -e '.[test,bench]'
	$(BIN)/python -m divisi.benchmarks
	$(BIN)/python -m divisi.benchmarks profile
	$(BIN)/python -m divisi.benchmarks served
	$(BIN)/python -m divisi.benchmarks steps
	$(BIN)/python -m divisi.benchmarks drafts

kernels: $(STAMP) ## what the compiler makes of the Triton kernels for each chip, to benchmarks/results/kernels.md
	$(BIN)/python -m tests.support.kernel_report

gpu-test: $(STAMP) ## on a GPU: every kernel against its reference, twice; the model; memcheck and racecheck
	$(BIN)/python -m divisi.benchmarks.gpu test

gpu-engine: $(STAMP) ## on a GPU: the engine in one process, tokens beside the references', then the time of decode steps
	$(BIN)/python -m divisi.benchmarks.gpu.engine

gpu-bench: $(STAMP) ## on a GPU: gpu-test, then times and shares of the card's peak, to benchmarks/results/
	$(BIN)/python -m divisi.benchmarks.gpu bench --out benchmarks/results

gpu-gang: $(STAMP) ## on a GPU: gangs whose rows travel by NCCL, all ranks on one card if need be: tokens, lost shards
	$(BIN)/pytest -v tests/distributed/test_nccl.py

monitoring: $(STAMP) ## rewrite k8s/monitoring/ (dashboards, alerts) from deploy/monitoring/
	$(BIN)/python -m divisi.deploy.monitoring k8s/monitoring

lock: $(STAMP) ## rewrite requirements.lock from .venv
	$(BIN)/python .ci/lock.py > requirements.lock.new
	mv requirements.lock.new requirements.lock

clean: ## remove what was built, but not .venv
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find $(FOLDERS) tests -name __pycache__ -type d -prune -exec rm -rf {} +
