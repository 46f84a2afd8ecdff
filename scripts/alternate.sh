#!/usr/bin/env bash
# Alternation, as FedRAG's trainer manager has it: the reader teaches the retriever, the retriever
# finds new contexts, and the same reader goes on with them. Here NaturalQuestions, on 8 GPUs.
#
#   scripts/get_data.sh fid-nq && python scripts/fid_data.py nq --data data
#   scripts/alternate.sh 2                   # rounds; the same command goes on where it was stopped
#   TEACHER=lsr scripts/alternate.sh 2
#
# Round 0 searches with BM25 and trains a reader on what it finds. Each later round then has the last
# round's reader score its training contexts, distils the scores into the last round's retriever (the
# first time into MODEL), searches with it, and trains the last round's reader on. TEACHER says how
# contexts are scored: by the reader's cross-attention (fid-kd, arXiv 2012.04584), or by how likely
# each alone makes the answer to it (lsr, arXiv 2301.12652, section 4). scripts/fid-kd.sh trains a
# new reader each round instead.
#
# Left in OUT, for round N: what scripts/fid-kd.sh leaves, and best/reader and best/retriever, which
# name those of the round with the highest EM on DEV; round 0 has no retriever. Not run here.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # started by sh
set -euo pipefail
. "$(dirname "$0")/stages.sh"
OUT=${OUT:-runs/alternate}
ROUNDS=${1:-${ROUNDS:-2}}
TEACHER=${TEACHER:-fid-kd}
HITS=${HITS:-100}
CONTEXTS=${CONTEXTS:-$HITS}
MODEL=${MODEL:-bert-base-uncased}
READER_MODEL=${READER_MODEL:-t5-base}
READER_FLAGS=${READER_FLAGS:---max_length 250 --use_checkpoint --batch_size 2 \
--grad_accumulation $(share 32) --batch_size_val 4 --epochs 5 --lr 1e-4 --num_warmup_steps 1000 \
--dropout 0.1 --num_workers 3}
case $TEACHER in
    fid-kd) loss="--loss fid-kd --student_temperature 27.7" ;;  # see scripts/fid-kd.sh
    lsr) loss="--loss kl --student_temperature 0.1" ;;          # see scripts/lsr.sh
    *)
        echo "error: TEACHER is '$TEACHER'; it must be fid-kd or lsr" >&2
        exit 1 ;;
esac
RETRIEVER_FLAGS=${RETRIEVER_FLAGS:-$loss --group_size 100 $(batch 8) --lr 1e-4 --max_steps 20000 \
--num_warmup_steps 1000 --pooling_method mean --dense_metric ip --query_max_length 40 \
--key_max_length 200 --num_workers 3}
if ! [[ $ROUNDS =~ ^[0-9]+$ ]]; then
    echo "error: the number of rounds is '$ROUNDS'; give one, as in scripts/alternate.sh 2" >&2
    exit 1
fi
. "$ROOT/scripts/rounds.sh"

score_contexts() {  # ROUND LAST: the last round's reader scores what it was trained on, into SCORED
    local contexts=$OUT/contexts.$2.train
    if [ "$TEACHER" = fid-kd ]; then
        SCORED=$OUT/scored.$1.jsonl
        stage "scores$1" $LAUNCH "$ROOT/test.py" "$OUT/reader$2" "$contexts.jsonl" \
            --num_contexts "$HITS" --scores "$SCORED" ${SCORE_FLAGS:-} --gpus "$GPUS"
    else
        SCORED=$contexts.scored.reader.jsonl
        stage "scores$1" $LAUNCH "$ROOT/lm_score.py" --eval_data "$contexts.jsonl" \
            --model_name_or_path "$OUT/reader$2" --save_name reader --likelihood sum \
            ${SCORE_FLAGS:-} --gpus "$GPUS"
    fi
}

search_all 0
train_reader 0
rows=("0=$OUT/reader0/args.json")
for ((round = 1; round <= ROUNDS; round++)); do
    last=$((round - 1))
    score_contexts $round $last
    train_retriever $round "$SCORED"
    search_all $round
    READER_MODEL=$OUT/reader$last
    train_reader $round
    rows+=("$round=$OUT/reader$round/args.json")
done
print_rounds

# the best round, named by links that change in one step
best=$($PYTHON "$ROOT/scripts/table.py" "${rows[@]}" --columns dev_em --best dev_em)
mkdir -p "$OUT/round$best"
ln -sfn "../reader$best" "$OUT/round$best/reader"
if [ "$best" != 0 ]; then
    ln -sfn "../retriever$best" "$OUT/round$best/retriever"
fi
ln -sfn "round$best" "$OUT/best.new"
mv -fT "$OUT/best.new" "$OUT/best"
echo "the best on dev is round $best: $OUT/best"
