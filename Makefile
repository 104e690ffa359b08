# Each target makes .venv and installs what it needs there on first use. `make` alone lists the targets.
PYTHON ?= python3
BIN = .venv/bin

help:
	@echo 'make demo       cluster handwritten digits without labels: about a minute after installation'
	@echo 'make lab        open the notebooks in JupyterLab'
	@echo 'make test       lint, unit tests, and every notebook executed'
	@echo 'make notebooks  export and execute all notebooks, store their outputs (SLOW=1: the slow cells too)'
	@echo 'make readme     write README.md from nbs/index.ipynb'
	@echo 'make docs       write the website into _docs'
	@echo 'make bench      run the benchmarks, about half an hour, and store what they show'
	@echo 'make clean      remove caches and built pages; keeps .venv and runs'

demo: .venv/.run
	$(BIN)/scan-nb run digits --out runs/digits
	@echo 'The report is runs/digits/report.html: open it in a browser.'

lab: .venv/.dev
	$(BIN)/jupyter lab nbs

test: .venv/.dev
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n auto --no-loadscope-reorder --durations=10 \
	  -o tmp_path_retention_policy=failed

notebooks: .venv/.dev
	$(BIN)/nbdev_export
	$(BIN)/python tests/run_notebooks.py $(if $(SLOW),--slow --gpu)
	$(BIN)/python tests/render.py readme

readme: .venv/.dev
	$(BIN)/python tests/render.py readme

docs: .venv/.dev
	$(BIN)/python tests/build_site.py
	@echo 'The site is in _docs: open _docs/index.html in a browser.'

bench: .venv/.bench
	OMP_NUM_THREADS=$$($(BIN)/python -c 'import os; print(os.cpu_count())') \
	  $(BIN)/python tests/run_notebooks.py --slow --gpu nbs/benchmarks.ipynb

clean:
	rm -rf _docs _proc build dist .pytest_cache .ruff_cache .hypothesis
	find nbs scan_nb tests \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

# The runtime requirements are enough for `demo`; the rest adds the extras for work on it. PyTorch is large: minutes.
.venv/.run: settings.ini setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	  { echo 'scan_nb needs Python 3.10 or newer, which `$(PYTHON)` is not; name one that is: make PYTHON=python3.12'; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -e .
	@touch $@

.venv/.dev: .venv/.run
	$(BIN)/python -m pip install -e '.[dev,docs]'
	@touch $@

.venv/.bench: .venv/.dev
	$(BIN)/python -m pip install -e '.[bench]'
	@touch $@

.PHONY: help demo lab test notebooks readme docs bench clean
