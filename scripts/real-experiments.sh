#!/usr/bin/env bash
# Experiments that explain why some methods gain little on real words (docs/real.md). They need the
# output of ALL=yes scripts/demo-real.sh, with seed 1, in the same OUT.
#
#   scripts/real-experiments.sh
#   BIG=yes scripts/real-experiments.sh     # also a ranker of all first sentences, in two epochs
#
# The same command continues where it was stopped.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # started by sh
set -euo pipefail
SPLIT=dev
SEED=1
. "$(dirname "$0")/real.sh"
DEMO=$WORK/$SEED
OUT=$WORK/experiments
TOP200=$DEMO/labelled.neg.top200.jsonl
for name in ranker reader2; do
    need_file "$DEMO/stages/$name-test" "ALL=yes scripts/demo-real.sh, seed 1, writes it"
done

# ---------------------------------------------------------------- what a ranker learns

measure_ranker() {  # NAME FOLDER: reorders the candidates of the dev questions
    measure "$1" --retrieval_method rank --ranker --query_encoder "$2" \
        --results "$OUT/candidates.dev.trec"
}

# can it learn at all, and at which learning rate? The losses are in OUT/overfit-*.jsonl
overfit_rankers() {
    take_first 16 "$TOP200" "$OUT/few.jsonl"
    train overfit-5e-4 "$OUT/few.jsonl" "$MINILM" $RANKER_FLAGS --epochs 40 --lr 5e-4
    train overfit-1e-4 "$OUT/few.jsonl" "$MINILM" $RANKER_FLAGS --epochs 40 --lr 1e-4
}

train_rankers() {
    local dpr2="--query_encoder $DEMO/dpr2 --version none --index $DEMO/dpr2.index"
    measure candidates $dpr2
    link_input "$DOCS/labelled.jsonl" "$OUT/labelled.jsonl"
    mine top20 "$OUT/labelled.jsonl" $dpr2
    train ranker-top20 "$OUT/labelled.neg.top20.jsonl" "$MINILM" $RANKER_FLAGS --epochs 2
    measure_ranker ranker-top20 "$OUT/ranker-top20"
    measure_ranker ranker "$DEMO/ranker"
    if [ "${BIG:-no}" = yes ]; then
        link_input "$DOCS/pairs.jsonl" "$OUT/pairs.jsonl"
        CORPUS=$DOCS/rests.jsonl mine rests "$OUT/pairs.jsonl" --hits 50 $BM25 \
            --index "$DEMO/rests.index"
        train ranker-big "$OUT/pairs.neg.rests.jsonl $TOP200" "$MINILM" $RANKER_FLAGS \
            --epochs 2 --lr 5e-4
        measure_ranker ranker-big "$OUT/ranker-big"
    fi
}

# ---------------------------------------------------------------- how the reader reads

measure_readers() {
    search minilm-contexts "$DOCS/dev.jsonl" 3 $MINILM_SEARCH --output "$OUT/contexts.jsonl"
    for temperature in 0.05 0.02 0.01; do
        answer "reader-$temperature" "$DEMO/reader" "$OUT/contexts.jsonl" --num_contexts 1 3 \
            --retriever_temperature "$temperature"
    done
    take_first 40 "$DOCS/gold.dev.jsonl" "$OUT/gold.jsonl"
    local gold="$GOLD_FLAGS --max_length 400"
    answer examples "$SMOLLM" "$OUT/gold.jsonl" $gold --prompt_template "$EXAMPLES$PROMPT"
    answer no-examples "$SMOLLM" "$OUT/gold.jsonl" $gold --prompt_template "$PROMPT"
}

overfit_and_read() {
    overfit_rankers
    measure_readers
}

# ---------------------------------------------------------------- the tables

export OMP_NUM_THREADS=$HALF_THREADS
mkdir -p "$OUT"
redo_stages  # before the lanes, which could not tell each other
run_both train_rankers overfit_and_read

print_table() {  # COLUMNS ROW...
    echo
    $PYTHON "$ROOT/scripts/table.py" --columns $1 "${@:2}"
}

echo
$PYTHON "$ROOT/bench/teachers.py" "$LSR_DATA.minilm.scored.lsr.jsonl" --qrels "$DOCS/qrels.train.tsv"
ROWS=("the candidates=$OUT/candidates.dev.json" "negatives of the top 20=$OUT/ranker-top20.dev.json"
    "demo-real's ranker=$OUT/ranker.dev.json")
if [ "${BIG:-no}" = yes ]; then
    ROWS+=("all first sentences=$OUT/ranker-big.dev.json")
fi
print_table "recall@1 mrr@20" "${ROWS[@]}"
ROWS=("gold, no examples=$OUT/no-examples.dev.json" "gold, two examples=$OUT/examples.dev.json"
    "trained, 1 passage=$OUT/reader-0.05.dev.1.json")
for temperature in 0.05 0.02 0.01; do
    ROWS+=("trained, 3 at $temperature=$OUT/reader-$temperature.dev.3.json")
done
print_table "em f1" "${ROWS[@]}"
