#!/usr/bin/env bash
# FiD-KD (arXiv 2012.04584): reader and retriever from questions and answers alone, by rounds; no
# passage is labelled. Here NaturalQuestions, on 8 GPUs, from BM25's contexts.
#
#   scripts/get_data.sh fid-nq && python scripts/fid_data.py nq --data data
#   scripts/fid-kd.sh                 # the same command goes on where it was stopped
#
# Round 0 searches with BM25 and trains a reader on what it finds. Each of ROUNDS rounds then scores
# the reader's training contexts by its cross-attention, distils the scores into the retriever,
# searches with it, and trains a reader on that. Left in OUT, for round N: retrieverN, readerN,
# retrievalN.json and emN.json (measures on TEST), contexts.N.SPLIT.jsonl (HITS passages each).
#
# Published (FiD's README, for the retrievers that were trained so on DPR's contexts): an answer is
# among the first 5/20/100 passages of 73.8/84.3/89.3 % of NaturalQuestions' test questions, and of
# 77.0/83.6/87.7 % of TriviaQA's. Not run here on either; make demo-loop runs it on a small world.
#
# The retriever's flags are those of FiD's README; 27.7 is the root of the size of its vectors, which
# FiD's code divides scores by. The retriever goes on from round to round, the reader starts from
# READER_MODEL each time. HITS passages are found for a question, the reader reads the first CONTEXTS
# of them and scores all.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # started by sh
set -euo pipefail
OUT=${OUT:-runs/fid-kd}
ROUNDS=${ROUNDS:-2}
HITS=${HITS:-100}
CONTEXTS=${CONTEXTS:-$HITS}
MODEL=${MODEL:-bert-base-uncased}
READER_MODEL=${READER_MODEL:-t5-base}
READER_FLAGS=${READER_FLAGS:---max_length 250 --use_checkpoint --batch_size 2 --grad_accumulation 4 \
--batch_size_val 4 --epochs 10 --lr 1e-4 --num_warmup_steps 1000 --dropout 0.1 --num_workers 3}
RETRIEVER_FLAGS=${RETRIEVER_FLAGS:---loss fid-kd --group_size 100 --batch_size 1 --lr 1e-4 \
--max_steps 30000 --early_exit_steps 20000 --num_warmup_steps 1000 --pooling_method mean \
--dense_metric ip --student_temperature 27.7 --query_max_length 40 --key_max_length 200 \
--num_workers 3}
. "$(dirname "$0")/rounds.sh"

search_all 0
train_reader 0
for ((round = 1; round <= ROUNDS; round++)); do
    last=$((round - 1))
    stage "scores$round" $LAUNCH "$ROOT/test.py" "$OUT/reader$last" "$OUT/contexts.$last.train.jsonl" \
        --num_contexts "$HITS" --scores "$OUT/scored.$round.jsonl" ${SCORE_FLAGS:-} --gpus "$GPUS"
    train_retriever $round "$OUT/scored.$round.jsonl"
    search_all $round
    train_reader $round
done
print_rounds
