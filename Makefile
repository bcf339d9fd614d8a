# make demo    the main job on the embedded digits, step by step
# make test    the whole suite          make check   ruff, pyright
# make bench   the benchmarks, quick    make clean   everything made here, gone
# make results the committed results on Fashion-MNIST, anew (about a quarter of an hour on 2 cores)
# make results-schedules  those that the schedules' headers say, where they are missing
# VENV=path    use (and fill) another environment than .venv

VENV ?= .venv
PYTHON ?= python3
PY = $(VENV)/bin/python
RUN = $(PY) compress_classifier.py
DEMO = logs/demo
READY = $(VENV)/.ready-$(shell cat requirements.txt requirements-dev.txt | cksum | cut -d' ' -f1)
BENCHMARK_PARTS = benchmarks/side_by_side.py benchmarks/plain_sweep.py

.PHONY: setup demo results results-schedules test test-slow check format readme reference bench clean

setup: $(READY)

$(READY): requirements.txt requirements-dev.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet -r requirements.txt -r requirements-dev.txt
	rm -f $(VENV)/.ready-*
	touch $@

# Each step is a plain command line, echoed before it runs: the demo is the tutorial.
LENET = $(RUN) --arch lenet5 --dataset digits -b 64 --seed 0 -p 50
DENSE = $(DEMO)/dense/latest_log_dir/checkpoint.pth.tar

demo: setup
	rm -rf $(DEMO)
	@echo; echo "== 1. Train a small network"
	$(LENET) -o $(DEMO)/dense --epochs 15 --lr 0.02
	@echo; echo "== 2. Prune it under a schedule: 90 % of its weights"
	$(LENET) -o $(DEMO)/pruned --epochs 20 --lr 0.02 --compress schedules/agp/lenet5_digits.yaml \
	    --resume-from $(DENSE) --reset-optimizer
	@echo; echo "== 3. Sweep the sensitivity of the dense network's layers"
	$(LENET) -o $(DEMO)/sweep --sense element --exp-load-weights-from $(DENSE)
	@echo; echo "== 4. Collect activation statistics on a fifth of the training set"
	$(LENET) -o $(DEMO)/stats --qe-calibration 0.2 --exp-load-weights-from $(DENSE)
	@echo; echo "== 5. Quantize to 8 bits with them"
	$(LENET) -o $(DEMO)/int8 --evaluate --quantize-eval --qe-per-channel --qe-mode-acts asym_u \
	    --qe-stats-file $(DEMO)/stats/latest_log_dir/acts_quantization_stats.yaml \
	    --exp-load-weights-from $(DENSE)
	@echo; echo "== Done. The results cards are above; the plot is $(DEMO)/sweep/latest_log_dir/sensitivity.png"

test: setup
	$(PY) -m pytest -n 2 -m "not slow"

test-slow: setup
	$(PY) -m pytest -m slow

check: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --pythonpath $(PY)

readme: setup
	$(PY) docs/update_readme.py

reference: setup
	$(PY) -m docs.update_reference
	$(PY) -m distiller.schedule_schema -o schedules/schedule.schema.json

format: setup
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

FASHION = $(RUN) --arch lenet5 --dataset fashion-mnist --seed 1 -p 200 -b 128
FASHION_LOGS = logs/results/lenet5_fashion_mnist
FASHION_DENSE = $(FASHION_LOGS)/dense/latest_log_dir/checkpoint.pth.tar
FASHION_DOCS = docs/results/lenet5_fashion_mnist
FASHION_STATS = $(FASHION) --qe-calibration 0.05 --exp-load-weights-from $(FASHION_DENSE) -o $(FASHION_LOGS)/stats

results: setup
	rm -rf $(FASHION_LOGS)
	$(FASHION) -o $(FASHION_LOGS)/dense --epochs 20 --lr 0.05 --wd 5e-4 \
	    --compress schedules/baseline_networks/lenet5_fashion_mnist.yaml
	$(FASHION) -o $(FASHION_LOGS)/agp --epochs 16 --lr 0.02 --wd 1e-4 \
	    --compress schedules/agp/lenet5_fashion_mnist.yaml --resume-from $(FASHION_DENSE) --reset-optimizer
	$(FASHION) -o $(FASHION_LOGS)/sweep --sense element --exp-load-weights-from $(FASHION_DENSE)
	$(FASHION_STATS)
	$(FASHION) -o $(FASHION_LOGS)/int8 --evaluate --quantize-eval --qe-per-channel --qe-mode-acts asym_u \
	    --qe-stats-file $(FASHION_LOGS)/stats/latest_log_dir/acts_quantization_stats.yaml \
	    --exp-load-weights-from $(FASHION_DENSE)
	mkdir -p $(FASHION_DOCS) stats
	for run in dense agp int8; do cp $(FASHION_LOGS)/$$run/latest_log_dir/results.json $(FASHION_DOCS)/$$run.json; done
	cp $(FASHION_LOGS)/sweep/latest_log_dir/sensitivity.csv $(FASHION_LOGS)/sweep/latest_log_dir/sensitivity.png $(FASHION_DOCS)
	(echo "# Activation statistics of LeNet-5 on Fashion-MNIST, written by 'make results' with:"; \
	 echo "# $(subst $(PY),python,$(FASHION_STATS))"; \
	 cat $(FASHION_LOGS)/stats/latest_log_dir/acts_quantization_stats.yaml) > stats/lenet5_fashion_mnist_act_stats.yaml
	$(PY) -m docs.measure_schedules --headers

results-schedules: setup
	$(PY) -m docs.measure_schedules

bench: setup
	@for benchmark in $(filter-out $(BENCHMARK_PARTS),$(wildcard benchmarks/*.py)); do echo "== $$benchmark --quick"; $(PY) $$benchmark --quick || exit 1; done

clean:
	rm -rf .venv logs .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
