#!/usr/bin/env bash
# SimLM's pipeline of three retrievers and a ranker on NaturalQuestions, on 8 GPUs; the stages are
# told in scripts/3iter.sh.
#
#   OUT=/data scripts/get_data.sh llm-embedder     # LLM-Embedder's data, 17 GB packed
#   DATA=/data/llm-embedder scripts/3iter-nq.sh    # the same command goes on where it was stopped
#
# The flags are those of SimLM's scripts (github.com/microsoft/unilm, simlm/scripts/dpr), the form of
# the data and the name of this script LLM-Embedder's. Published for SimLM (arXiv 2207.02578): an
# answer among the first 20 passages for 85.2 % of the test questions. Not run here.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # started by sh
set -euo pipefail
DATA=${DATA:-/data/llm-embedder}
OUT=${OUT:-runs/3iter-nq}
MODEL=${MODEL:-intfloat/simlm-base-wiki100w}
TRAIN=${TRAIN:-$DATA/qa/nq/train.json}
TEST=${TEST:-$DATA/qa/nq/test.json}
CORPUS=${CORPUS:-$DATA/qa/nq/corpus.json}

METRICS="nq"
CUTOFFS="1 5 20 100"
COLUMNS="nq@1 nq@5 nq@20 nq@100"
HITS=${HITS:-100}
LENGTHS="--query_max_length 32 --key_max_length 192"
MINING="--filter_answers"  # a passage that holds an answer is no negative
RETRIEVER_FLAGS=${RETRIEVER_FLAGS:---batch_size 8 --group_size 16 --lr 1e-5 --max_steps 20000}
RANKER_FLAGS=${RANKER_FLAGS:---batch_size 4 --group_size 16 --lr 3e-5 --max_steps 20000}
DISTILLED_FLAGS=${DISTILLED_FLAGS:---batch_size 8 --group_size 16 --lr 3e-5 --epochs 15 \
--contrastive_weight 1}
. "$(dirname "$0")/3iter.sh"
