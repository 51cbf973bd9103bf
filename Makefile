# make demo [ADAPTER=lora|qlora|prompt-tuning|bh-peft|hybrid]   the whole pipeline in minutes, on CPU or GPU, and its
#                                                               report: results/report.html
# make report                                                   results/report.html of all runs so far
# make test [JOBS=2]                                            all tests but those of the next two lines, two at a time
# make test-demos                                               the demo of each adapter, minutes each
# make test-faults                                              kills real runs, fills disks, mistypes flags; a summary
# make lint                                                     ruff, and a search for secrets
# make docs                                                     docs/api/index.html: the reference, from docstrings
# Each sets up .venv itself. A GPU build, or another CPU build, of torch: make demo TORCH="torch==2.13.0 ..."
PYTHON  ?= python3
TORCH   ?= torch==2.13.0
ADAPTER ?= lora
JOBS    ?= 2
# One rank a GPU; without GPUs two ranks where there are two cores.
RANKS   ?= $(shell nvidia-smi -L 2>/dev/null | grep -c GPU | grep -v '^0$$' || { [ $$(nproc) -ge 2 ] && echo 2 || echo 1; })
BIN     := .venv/bin
# With the environment's programs first: DeepSpeed looks for `ninja` on the PATH.
# What DeepSpeed compiles lies in it too: two checkouts would have each other's compiled anew, again and again.
RUN     := PATH="$(CURDIR)/$(BIN):$$PATH" TORCH_EXTENSIONS_DIR="$(CURDIR)/.venv/torch_extensions"

.PHONY: demo report test test-demos test-faults lint docs clean

demo: .venv/ready
	$(RUN) accelerate launch --config_file ds_zero3_cpu.yaml --num_processes $(RANKS) demo/demo.py --adapter_name $(ADAPTER)

report: .venv/ready
	$(RUN) python util/report.py

test: .venv/test-ready
	$(RUN) HF_HUB_OFFLINE=1 python -m pytest -n $(JOBS)

test-demos: .venv/test-ready
	$(RUN) HF_HUB_OFFLINE=1 python -m pytest -m demos tests/test_demo.py

test-faults: .venv/test-ready
	$(RUN) HF_HUB_OFFLINE=1 python tests/faults/run.py

lint: .venv/test-ready
	$(RUN) ruff check .
	$(RUN) python tests/secret_scan.py

docs: .venv/docs-ready
	$(RUN) python -m pdoc --docformat google -o docs/api bhpeft '!bhpeft.web_chat'  # it needs Gradio

.venv/ready: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check "setuptools>=78.1.1" wheel $(TORCH)
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation -e .
	touch $@

.venv/test-ready: .venv/ready requirements-test.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-test.txt
	$(RUN) python tests/compile_deepspeed.py
	touch $@

.venv/docs-ready: .venv/ready requirements-docs.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	touch $@

clean:
	rm -rf .venv build docs/api *.egg-info
