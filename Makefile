# make study: from nothing to a fitted law.  make test: all tests, offline once installed.
# make pilot: is a dense checkpoint of the quick study, or of a short training, worth upcycling?
# make gpu: on a machine with GPUs, their tests, the speed of training and a study, as a file in results/.
# make figures: every figure of the README, from the rows in results/.
# A machine without a GPU can install the small build of torch (once, with the first make):
#     make study TORCH_INDEX=https://download.pytorch.org/whl/cpu
PYTHON = python3
PY = .venv/bin/python
DATA = pysource
STUDY = config/study_quick.py
OUT = out/study_quick
PILOT = out/pilot
BUDGET = 8388608
MADE = $(PILOT)/dense/checkpoint-512
DENSE = $(firstword $(wildcard $(MADE) $(OUT)/dense-N55536-s0/checkpoint-2048) $(MADE))
TORCH_INDEX =

study: .venv/runtime
	$(PY) data/prepare.py $(DATA)
	$(PY) sweep.py $(STUDY) --out_dir=$(OUT)
	$(MAKE) --no-print-directory $(OUT)/laws/laws.json
	@echo "rows: $(OUT)/rows.jsonl; laws, report.md and figures: $(OUT)/laws"

$(OUT)/laws/laws.json: $(OUT)/rows.jsonl
	$(PY) fit_laws.py $< --out=$(@D)

pilot: .venv/runtime
	$(PY) data/prepare.py $(DATA)
	$(MAKE) --no-print-directory $(DENSE)
	$(PY) sweep.py config/pilot.py --dense=$(DENSE) --dataset=data/$(DATA) --budget=$(BUDGET) --out_dir=$(PILOT)
	$(PY) fit_laws.py $(PILOT)/rows.jsonl --laws=upcycled.head_start --out=$(PILOT)/laws
	$(PY) plan.py --laws=$(PILOT)/laws/laws.json --checkpoint=$(DENSE) --tokens=$(BUDGET)

$(MADE):
	$(PY) train.py config/pilot_dense.py --dataset=data/$(DATA) --out_dir=$(PILOT)/dense --resume

test: .venv/test
	$(PY) -m pytest -q tests

gpu: .venv/test
	@$(PY) bench.py gpu

figures: .venv/runtime
	for study in study_quick study_methods study_router study_headers; do \
		$(PY) fit_laws.py results/$$study.jsonl --out=results/$$study || exit 1; \
	done
	$(PY) fit_laws.py results/study.jsonl --A_of_N --out=results/study
	mkdir -p out
	grep -h '"N": 23712,' results/study.jsonl results/study_more.jsonl > out/study_more.jsonl
	$(PY) fit_laws.py out/study_more.jsonl --out=results/study_more
	grep -h '"D": 2097152\|"D1": 4194304, "D2": 2097152' results/study.jsonl results/sparsity.jsonl | \
		grep '"N": 23712' | grep -v '"method": "drop"' > out/sparsity.jsonl
	$(PY) fit_laws.py out/sparsity.jsonl --out=results/sparsity
	cp results/study_quick/laws.json laws/pysource_quick.json
	cp results/study/laws.json laws/pysource.json
	PYTHONPATH=. $(PY) results/page.py

.venv/runtime: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
		"Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q -r requirements.txt $(TORCH_INDEX:%=--extra-index-url=%)
	touch $@

.venv/test: .venv/runtime requirements-test.txt
	$(PY) -m pip install -q -r requirements-test.txt
	touch $@

.PHONY: study pilot test gpu figures
