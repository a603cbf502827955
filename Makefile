# Every target brings its own environment (.venv) where one is needed.
PYTHON ?= python3
ENV = $(PYTHON) benchmarks/environment.py

.PHONY: demo test lint notebooks docs bench results

demo:
	$(PYTHON) benchmarks/demo.py

test:
	$(PYTHON) tests/run.py

lint:
	python=$$($(ENV) dev) && \
	$$python -m ruff check . && \
	$$python -m ruff format --check . && \
	$$python -m pyright --pythonpath $$python

notebooks:
	python=$$($(ENV) test) && $$python -m pytest -q --nbmake notebooks/*.ipynb

docs:
	python=$$($(ENV) docs) && \
	$$python -m sphinx -q -W --keep-going -j auto docs docs/_build/html && \
	echo "Open docs/_build/html/index.html"

bench:
	$(PYTHON) benchmarks/speed/run.py

# Every other table of benchmarks/README.md; hours.
results:
	$(PYTHON) benchmarks/product.py
	$(PYTHON) benchmarks/oracle_complexity.py
	$(PYTHON) benchmarks/run_overhead.py
	$(PYTHON) benchmarks/compare.py
	$(PYTHON) benchmarks/size.py
	$(PYTHON) benchmarks/reproduce/sparkle.py
	$(PYTHON) benchmarks/reproduce/cdadam.py
	$(PYTHON) benchmarks/reproduce/csoba.py
	$(PYTHON) benchmarks/hypergradients.py
	$(PYTHON) benchmarks/peers/run.py
	for part in wire bandwidth weak model faults memory; do \
		$(PYTHON) benchmarks/scale/$$part.py || exit 1; \
	done
	for part in toy rate modes memory accuracy; do \
		$(PYTHON) benchmarks/reproduce/rabo/$$part.py || exit 1; \
	done
	for part in depth accuracy devices pde condensation few_shot language; do \
		$(PYTHON) benchmarks/reproduce/fg2u/$$part.py || exit 1; \
	done
