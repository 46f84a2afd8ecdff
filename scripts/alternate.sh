#!/usr/bin/env bash
# Alternation, as FedRAG's trainer manager has it: the reader teaches the retriever, the retriever
# finds new contexts, the reader goes on with them. On NaturalQuestions, on 8 GPUs.
#
#   scripts/get_data.sh fid-nq && python scripts/fid_data.py nq    # the questions, and Wikipedia
#   scripts/alternate.sh 2                     # rounds; the same command goes on where it was stopped
#   TEACHER=lsr scripts/alternate.sh 2
#
# Round 0: the reader is trained on what BM25 finds. Round r: the reader of the round before scores
# the training questions' contexts; the retriever of the round before (the first: RETRIEVER_MODEL) is
# distilled from these scores; new contexts of all questions; the reader of the round before goes on
# with them. TEACHER says how it scores: by its cross-attention (fid-kd, arXiv 2012.04584) or by the
# likelihood of the answer given one context (lsr, arXiv 2301.12652, section 4). No passage labels
# are used.
#
# The round with the highest EM on dev is OUT/best (a link): OUT/best/reader and OUT/best/retriever,
# which round 0 has not. scripts/fid-kd.sh trains a new reader in each round instead. READER_FLAGS,
# RETRIEVER_FLAGS, SCORE_FLAGS and SEARCH_FLAGS add to the flags of the scripts, or take the place of
# what is set. Not run here.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # started by sh
set -euo pipefail
ROUNDS=${1:-${ROUNDS:-2}}
DATA=${DATA:-data}
OUT=${OUT:-runs/alternate}
TEACHER=${TEACHER:-fid-kd}
READER_MODEL=${READER_MODEL:-t5-base}
RETRIEVER_MODEL=${RETRIEVER_MODEL:-bert-base-uncased}
TRAIN=${TRAIN:-$DATA/NQ/train.json}
DEV=${DEV:-$DATA/NQ/dev.json}
TEST=${TEST:-$DATA/NQ/test.json}
CORPUS=${CORPUS:-$DATA/psgs_w100.tsv.gz}
CONTEXTS=${CONTEXTS:-100}
METRICS=${METRICS:-nq}
CUTOFFS=${CUTOFFS:-1 5 20 100}
GPUS=${GPUS-0,1,2,3,4,5,6,7}
PROCESSES=${PROCESSES:-8}
PYTHON=${PYTHON:-python}
LAUNCH=${LAUNCH:-torchrun --standalone --nnodes=1 --nproc_per_node=$PROCESSES}
ROOT=$(dirname "$0")/..
. "$ROOT/scripts/stages.sh"
if ! [[ $ROUNDS =~ ^[0-9]+$ ]]; then
    echo "error: the number of rounds is '$ROUNDS'; give one, as in scripts/alternate.sh 2" >&2
    exit 1
fi
if [ "$TEACHER" != fid-kd ] && [ "$TEACHER" != lsr ]; then
    echo "error: TEACHER is '$TEACHER'; it must be fid-kd or lsr" >&2
    exit 1
fi
for file in "$TRAIN" "$DEV" "$TEST" "$CORPUS"; do
    need_file "$file" "scripts/get_data.sh fid-nq and scripts/fid_data.py nq make it; TRAIN, DEV, \
TEST and CORPUS name other files"
done

search() {  # ROUND METHOD...: the contexts of all questions
    local round=$1 split
    local -A questions=([train]=$TRAIN [dev]=$DEV [test]=$TEST)
    shift
    mkdir -p "$OUT/round$round"
    for split in train dev test; do
        stage "round$round-search-$split" $LAUNCH "$ROOT/retrieve.py" "$@" --overwrite_index \
            --corpus "$CORPUS" --eval_data "${questions[$split]}" --hits "$CONTEXTS" \
            --output "$OUT/round$round/$split.json" --metrics $METRICS --cutoffs $CUTOFFS \
            ${QRELS:+--qrels "qrels=${QRELS//'{split}'/$split}"} \
            --measures "$OUT/round$round/$split.retrieval.json" ${SEARCH_FLAGS:-} --gpus "$GPUS"
    done
}

read_contexts() {  # ROUND MODEL: trains the round's reader from MODEL, and measures it
    local folder=$OUT/round$1
    stage "round$1-reader" $LAUNCH "$ROOT/train_epoch.py" "$folder/reader" "$folder/train.json" \
        "$folder/dev.json" --t5_name "$2" --num_contexts "$CONTEXTS" --max_length 250 \
        --use_checkpoint --batch_size 1 --grad_accumulation 8 --batch_size_val 4 \
        --epochs 3 --lr 1e-4 --warmup_ratio 0.1 --num_workers 3 ${READER_FLAGS:-} --resume \
        --gpus "$GPUS"
    stage "round$1-test" $LAUNCH "$ROOT/test.py" "$folder/reader" "$folder/test.json" \
        --measures "$folder/reader.json" --gpus "$GPUS"
}

score_contexts() {  # ROUND: the round's reader scores the contexts that it was trained on
    local folder=$OUT/round$1
    if [ "$TEACHER" = fid-kd ]; then
        stage "round$1-scores" $LAUNCH "$ROOT/test.py" "$folder/reader" "$folder/train.json" \
            --scores "$folder/train.scored.json" ${SCORE_FLAGS:-} --gpus "$GPUS"
        SCORED=$folder/train.scored.json LOSS=fid-kd
    else
        stage "round$1-scores" $LAUNCH "$ROOT/lm_score.py" --eval_data "$folder/train.json" \
            --model_name_or_path "$folder/reader" --save_name reader --likelihood sum \
            ${SCORE_FLAGS:-} --gpus "$GPUS"
        SCORED=$folder/train.scored.reader.json LOSS=kl
    fi
}

search 0 --retrieval_method bm25 --index "$OUT/bm25-index"
read_contexts 0 "$READER_MODEL"
retriever=$RETRIEVER_MODEL
for ((round = 1; round <= ROUNDS; round++)); do
    score_contexts $((round - 1))
    stage "round$round-retriever" $LAUNCH "$ROOT/train_dense.py" --train_data "$SCORED" \
        --output_dir "$OUT/round$round/retriever" --query_encoder "$retriever" --loss $LOSS \
        --group_size "$CONTEXTS" --version none --query_max_length 40 --key_max_length 200 \
        --batch_size 1 --epochs 3 --lr 5e-5 --chunk_size 32 --bf16 --num_workers 1 \
        ${RETRIEVER_FLAGS:-} --resume --gpus "$GPUS"
    retriever=$OUT/round$round/retriever
    search $round --query_encoder "$retriever" --index "$OUT/index"
    read_contexts $round "$OUT/round$((round - 1))/reader"
done

rows=()
best=()
for ((round = 0; round <= ROUNDS; round++)); do
    folder=$OUT/round$round
    rows+=("round $round=$folder/test.retrieval.json,$folder/reader/args.json,$folder/reader.json")
    best+=("$round=$folder/reader/args.json")
done
columns=()
for metric in $METRICS; do
    for cutoff in $CUTOFFS; do
        columns+=("$metric@$cutoff")
    done
done
$PYTHON "$ROOT/scripts/table.py" "${rows[@]}" --columns "${columns[@]}" dev_em em f1
best=$($PYTHON "$ROOT/scripts/table.py" "${best[@]}" --columns dev_em --best dev_em)
ln -sfn "round$best" "$OUT/best.new"
mv -fT "$OUT/best.new" "$OUT/best"
echo "best on dev: round $best; $OUT/best"
