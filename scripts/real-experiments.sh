#!/usr/bin/env bash
# Experiments on the real models, which tell why some methods gain little (docs/real.md). They use
# what make demo-real has made; give the same OUT.
#
#   scripts/real-experiments.sh
#   BIG=yes scripts/real-experiments.sh     # also the ranker of all first sentences, two epochs
#
# The same command continues where it was stopped.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # started by sh
set -euo pipefail
SPLIT=dev
. "$(dirname "$0")/real.sh"
SEED=1
TRAINED_HERE=$WORK/$SEED  # what demo-real.sh has trained
OUT=$WORK/experiments
need_file "$TRAINED_HERE/reader" "make demo-real makes it"

measure_splits() {  # NAME: of a retriever
    for SPLIT in dev test check; do
        measure "$1" $(use "$1")
    done
}

# ---------------------------------------------------------------- what LSR learns from

score_train() {  # ten passages of each training question; demo-real.sh has scored the first ones
    search minilm-train "$DOCS/train.jsonl" "$SCORED" $UNTAUGHT --output "$OUT/minilm.train.jsonl"
    tail -n +$((TAUGHT + 1)) "$OUT/minilm.train.jsonl" > "$OUT/rest.jsonl"
    score lsr "$SMOLLM" "$OUT/rest.jsonl" --template "$SCORE_TEMPLATE"
    cat "$WORK/minilm.taught.scored.lsr.jsonl" "$OUT/rest.scored.lsr.jsonl" > "$OUT/scored.jsonl"
}

learn_from_likelihood() {
    score_train
    train kl10 "$OUT/scored.jsonl" "$MINILM" $LSR --epochs 1 --loss kl
    measure_splits kl10
    train emdr10 "$OUT/scored.jsonl" "$MINILM" $LSR --epochs 1 --loss emdr2
    measure_splits emdr10
    train emdr5 "$OUT/scored.jsonl" "$MINILM" $LSR --epochs 1 --loss emdr2 --group_size 5 \
        --select_negative first
    measure_splits emdr5
}

# ---------------------------------------------------------------- what a ranker learns

rank() {  # NAME RECORDS FLAGS...: trains a ranker, which reorders the candidates of the dev questions
    local name=$1 records=$2
    shift 2
    train "$name" "$records" "$MINILM" --ranker $RANKED "$@"
    measure "$name" --retrieval_method rank --ranker --query_encoder "$OUT/$name" \
        --results "$OUT/candidates.dev.trec"
}

train_rankers() {
    local dpr2="--query_encoder $TRAINED_HERE/dpr2 --version none --index $TRAINED_HERE/dpr2.index"
    local far=$TRAINED_HERE/labelled.neg.far.jsonl
    measure candidates $dpr2

    # can it learn at all, and at which rate
    first 16 "$far" "$OUT/few.jsonl"
    train overfit-5e-4 "$OUT/few.jsonl" "$MINILM" --ranker $RANKED --epochs 40 --lr 5e-4
    train overfit-1e-4 "$OUT/few.jsonl" "$MINILM" --ranker $RANKED --epochs 40 --lr 1e-4

    link "$DOCS/labelled.jsonl" "$OUT/labelled.jsonl"
    mine near "$OUT/labelled.jsonl" $dpr2
    rank ranker-near "$OUT/labelled.neg.near.jsonl" --epochs 2
    link "$TRAINED_HERE/some-pairs.jsonl" "$OUT/some-pairs.jsonl"
    mine whole "$OUT/some-pairs.jsonl" $BM25 --index "$WORK/bm25.index"
    rank ranker-whole "$OUT/some-pairs.neg.whole.jsonl"
    measure ranker --retrieval_method rank --ranker --query_encoder "$TRAINED_HERE/ranker" \
        --results "$OUT/candidates.dev.trec"
    if [ "${BIG:-no}" = yes ]; then
        link "$DOCS/pairs.jsonl" "$OUT/pairs.jsonl"
        CORPUS=$DOCS/rests.jsonl mine rests "$OUT/pairs.jsonl" --hits 50 $BM25 \
            --index "$TRAINED_HERE/rests.index"
        rank ranker-big "$OUT/pairs.neg.rests.jsonl $far" --epochs 2 --lr 5e-4
    fi
}

# ---------------------------------------------------------------- how the reader reads

read_dev() {
    local temperature
    measure minilm $UNTAUGHT
    for temperature in 0.05 0.02 0.01; do
        answer "reader-$temperature" "$TRAINED_HERE/reader" "$OUT/minilm.dev.jsonl" \
            --num_contexts 1 3 --retriever_temperature "$temperature"
    done
    first 40 "$DOCS/gold.dev.jsonl" "$OUT/gold.jsonl"
    local gold=(--num_contexts 1 --max_length 400 --passage_weights equal)
    answer gold-examples "$SMOLLM" "$OUT/gold.jsonl" "${gold[@]}" \
        --prompt_template "$EXAMPLES$PROMPT"
    answer gold-plain "$SMOLLM" "$OUT/gold.jsonl" "${gold[@]}" --prompt_template "$PROMPT"
}

read_and_rank() {
    train_rankers
    read_dev
}

# ---------------------------------------------------------------- the tables

export OMP_NUM_THREADS=$BESIDE
run_both learn_from_likelihood read_and_rank

table() {  # COLUMNS ROW...
    echo
    $PYTHON "$ROOT/scripts/table.py" --columns $1 "${@:2}"
}

echo
$PYTHON "$ROOT/bench/teachers.py" "$OUT/scored.jsonl" --qrels "$DOCS/qrels.train.tsv"
for SPLIT in dev test check; do
    table "recall@1 recall@5 mrr@20" "KL, $SPLIT=$OUT/kl10.$SPLIT.json" \
        "EMDR2, $SPLIT=$OUT/emdr10.$SPLIT.json" "EMDR2, 5 passages, $SPLIT=$OUT/emdr5.$SPLIT.json"
done
ROWS=("the order of DPR=$OUT/candidates.dev.json" "negatives of 20=$OUT/ranker-near.dev.json" \
    "first sentences, whole docstrings=$OUT/ranker-whole.dev.json" \
    "demo-real's ranker=$OUT/ranker.dev.json")
[ "${BIG:-no}" = no ] || ROWS+=("all first sentences=$OUT/ranker-big.dev.json")
table "recall@1 mrr@20" "${ROWS[@]}"
ROWS=("no examples=$OUT/gold-plain.dev.json" "two examples=$OUT/gold-examples.dev.json" \
    "trained, 1 passage=$OUT/reader-0.05.dev.1.json")
for temperature in 0.05 0.02 0.01; do
    ROWS+=("trained, 3 at $temperature=$OUT/reader-$temperature.dev.3.json")
done
table "em f1" "${ROWS[@]}"
