#!/usr/bin/env bash
# FiD-KD (arXiv 2012.04584): reader and retriever from questions and answers alone, by rounds; no
# passage is labelled. Here NaturalQuestions, on 8 GPUs, from BM25's contexts.
#
#   scripts/get_data.sh fid-nq && python scripts/fid_data.py nq --data data
#   scripts/fid-kd.sh                 # the same command goes on where it was stopped
#   scripts/fid-kd.sh --toy           # one round on the embedded world: two minutes on one core
#
# Round 0 searches with BM25 and trains a reader on what it finds. Each of ROUNDS rounds then scores
# the reader's training contexts by its cross-attention, distils the scores into the retriever,
# searches with it, and trains a reader on that. Left in OUT, for round N: retrieverN, readerN,
# retrievalN.json and emN.json (measures on TEST), contexts.N.SPLIT.jsonl (HITS passages each).
#
# Published (FiD's README, for its released retrievers): an answer is among the first 5/20/100 passages
# of 73.8/84.3/89.3 % of NaturalQuestions' test questions, and of 77.0/83.6/87.7 % of TriviaQA's. Their
# reader, which was trained on what they find, has EM 50.1 on NaturalQuestions' test. The last round is
# compared with these; the exit code is 0 if all are at most 1.5 away, and 2 if not: FiD does not say from
# which passages it started and how often it went round, and nobody has published several seeds.
#
# An estimated 1,700 GPU hours of V100s: 525 a reader (scripts/nq.sh) for three of them, 30 a round to
# score 79,168 x 100 passages, 9 to encode Wikipedia, 15 to train the retriever. 150 GB of disk: 32.3 GB of
# vectors at a time, 7 GB of records with contexts and 7 GB with scores a round, models and states.
# BM25's index of Wikipedia is made by one process with hundreds of GB of memory (docs/retrieval.md). Not
# run here at full size; make demo-loop runs two rounds on the embedded world.
#
# The retriever's flags are those of FiD's README; 27.7 is the root of the size of its vectors, which
# FiD's code divides scores by; its texts have FiD's marks. The retriever goes on from round to round,
# the reader starts from READER_MODEL each time. HITS passages are found for a question, the reader reads
# the first CONTEXTS of them and scores all.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # started by sh
set -euo pipefail
. "$(dirname "$0")/stages.sh"
read_flags "$@"
if [ "$TOY" ]; then
    make_published fid-nq
    make_records
    ROUNDS=1 HITS=8 TEST_HITS=20 CONTEXTS=3 CUTOFFS="1 5 20" MODEL=$BERT READER_MODEL=$T5
    SCORE_FLAGS="--score_kind attention --batch_size 64" TEST_FLAGS="--batch_size 64"
    READER_FLAGS=$TOY_READER
    # beside the distillation: what the teacher likes best against other questions' passages
    RETRIEVER_FLAGS="$TOY_RETRIEVER --epochs 4 --group_size 4 --select_positive teacher \
--contrastive_weight 1"
fi
OUT=${OUT:-runs/fid-kd}
ROUNDS=${ROUNDS:-2}
HITS=${HITS:-100}
CONTEXTS=${CONTEXTS:-$HITS}
MODEL=${MODEL:-bert-base-uncased}
READER_MODEL=${READER_MODEL:-t5-base}
QUERY_TEMPLATE=${QUERY_TEMPLATE:-question: {query\}}
KEY_TEMPLATE=${KEY_TEMPLATE:-title: {title\} context: {text\}}
READER_FLAGS=${READER_FLAGS:---max_length 250 --use_checkpoint --batch_size 2 \
--grad_accumulation $(share 32) --batch_size_val 4 --epochs 10 --lr 1e-4 --num_warmup_steps 1000 \
--dropout 0.1 --num_workers 3}
RETRIEVER_FLAGS=${RETRIEVER_FLAGS:---loss fid-kd --group_size 100 $(batch 8) --lr 1e-4 \
--max_steps 30000 --early_exit_steps 20000 --num_warmup_steps 1000 --pooling_method mean \
--dense_metric ip --student_temperature 27.7 --query_max_length 40 --key_max_length 200 \
--num_workers 3}
. "$ROOT/scripts/rounds.sh"

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
if [ "$TOY" ]; then
    expect "FiD-KD, BM25's contexts, reader's EM" "$OUT/em0.json" em 86 8
    expect "FiD-KD, round 1, top-1" "$OUT/retrieval1.json" nq@1 58 10
    expect "FiD-KD, round 1, top-5" "$OUT/retrieval1.json" nq@5 93 7
    expect "FiD-KD, round 1, reader's EM" "$OUT/em1.json" em 74 10
else
    expect "FiD-KD, NQ test top-5" "$OUT/retrieval$ROUNDS.json" nq@5 73.8 1.5
    expect "FiD-KD, NQ test top-20" "$OUT/retrieval$ROUNDS.json" nq@20 84.3 1.5
    expect "FiD-KD, NQ test top-100" "$OUT/retrieval$ROUNDS.json" nq@100 89.3 1.5
    expect "FiD base on FiD-KD's passages, NQ test EM" "$OUT/em$ROUNDS.json" em 50.1 1.5
fi
compare
