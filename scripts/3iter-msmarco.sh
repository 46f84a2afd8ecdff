#!/usr/bin/env bash
# SimLM's pipeline of three retrievers and a ranker on MS MARCO's passages, on 8 GPUs; the stages are
# told in scripts/3iter.sh.
#
#   OUT=/data scripts/get_data.sh llm-embedder          # LLM-Embedder's data, 17 GB packed
#   DATA=/data/llm-embedder scripts/3iter-msmarco.sh    # the same command goes on where it was stopped
#
# The flags are those of SimLM's scripts (github.com/microsoft/unilm, simlm/scripts), the form of the
# data and the name of this script LLM-Embedder's. SimLM's README expects these MRR@10 on dev: 38.0
# for retriever 1, 43.8 for the ranker, 41.1 for retriever 3; it trains the retrievers on 4 GPUs of
# 32 GB, the ranker on 8. Not run here.
#
# TEST holds dev's queries with their positives as pos_index; or their labels are given by the
# corpus's ids: QRELS=FILE.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # started by sh
set -euo pipefail
DATA=${DATA:-/data/llm-embedder}
OUT=${OUT:-runs/3iter-msmarco}
MODEL=${MODEL:-intfloat/simlm-base-msmarco}
TRAIN=${TRAIN:-$DATA/qa/msmarco/train.json}
TEST=${TEST:-$DATA/qa/msmarco/dev.json}
CORPUS=${CORPUS:-$DATA/qa/msmarco/corpus.json}

METRICS="mrr recall ndcg"
CUTOFFS="10 50 200"
COLUMNS="mrr@10 ndcg@10 recall@50 recall@200"
HITS=${HITS:-200}
LENGTHS="--query_max_length 32 --key_max_length 144"
MINING=
RETRIEVER_FLAGS=${RETRIEVER_FLAGS:---batch_size 8 --group_size 16 --lr 2e-5 --epochs 3 \
--select_positive random}
RANKER_FLAGS=${RANKER_FLAGS:---batch_size 8 --group_size 16 --lr 3e-5 --epochs 3 \
--select_positive random}
DISTILLED_FLAGS=${DISTILLED_FLAGS:---batch_size 8 --group_size 24 --lr 3e-5 --epochs 6 \
--contrastive_weight 0.2}
. "$(dirname "$0")/3iter.sh"
