# make demo: set up, train and evaluate a reader on the embedded world.   make test: set up, run all tests.
PYTHON ?= python3
BIN = .venv/bin
DEMO = out/demo

.PHONY: demo test clean

demo: .venv/ready
	$(BIN)/python toy/world.py --out toy/data
	$(BIN)/python train_epoch.py $(DEMO) toy/data/train.json toy/data/dev.json --t5_name toy/t5-tiny --num_contexts 10 \
		--max_length 100 --batch_size 8 --batch_size_val 64 --epochs 2 --lr 5e-4 --num_warmup_steps 20 --dropout 0
	$(BIN)/python test.py $(DEMO) toy/data/test.json --num_contexts 0 1 2 5 10 --batch_size 64

test: .venv/ready-dev
	$(BIN)/python -m pytest -q tests

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.txt
	touch $@

.venv/ready-dev: requirements-dev.txt .venv/ready
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv out toy/data
