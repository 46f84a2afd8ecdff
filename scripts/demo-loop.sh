#!/usr/bin/env bash
# The loop on the embedded world: every way to teach a retriever, and the reader that each one feeds,
# in one table.
#
#   scripts/demo-loop.sh                    # make demo-loop
#   SEEDS="1 2 3" scripts/demo-loop.sh      # the spread of three seeds
#
# The same command goes on where it was stopped. All retrievers start from one that has seen crops of
# the corpus, and no question. fid-kd.sh and lsr.sh get questions and answers alone, 3iter.sh gets the
# gold passages of the training questions. A row's reader is trained and tested on the first CONTEXTS
# passages of its retriever. Two stages run side by side, each on half of the cores.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # started by sh
set -euo pipefail
SEEDS=${SEEDS:-1}
WORK=${OUT:-out/loop}
PYTHON=${PYTHON:-python}
LAUNCH=${LAUNCH:-$PYTHON}
GPUS=
HITS=8        # what the teachers score
TEST_HITS=20  # what is measured
CONTEXTS=5    # what a reader reads
ROOT=$(dirname "$0")/..
WORLD=$WORK/world
CORPUS=$WORLD/corpus.tsv
DEV=$WORLD/dev.json
TEST=$WORLD/test.json
T5=$ROOT/toy/t5-tiny
BM25_FLAGS="--k1 1.5 --b 0.75"  # bm25s's, which are better here than 0.9 and 0.4
METRICS=recall
CUTOFFS="1 5 20"
COLUMNS="recall@1 recall@5 recall@20"
QRELS=$WORLD/qrels.test.tsv
LENGTHS="--query_max_length 32 --key_max_length 110"
# the recipes' sizes, texts and published figures are of other data
DISK=1
COMPARE=no
QUERY_TEMPLATE="{query}"
KEY_TEMPLATE="{title} {text}"
export DISK COMPARE QUERY_TEMPLATE KEY_TEMPLATE
export PYTHON LAUNCH GPUS HITS TEST_HITS CONTEXTS CORPUS DEV TEST BM25_FLAGS METRICS CUTOFFS QRELS
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + 1) / 2))}

set_flags() {  # SEED
    START="$LENGTHS --cos_temperature 0.03 --lr 3e-3 --num_warmup_steps 20 --group_size 1 \
--batch_size 128 --epochs 1 --seed $1"
    TRAINED="--cos_temperature 0.05 --lr 2e-3 --num_warmup_steps 20 --batch_size 64 --bf16 false \
--seed $1"
    # beside the distillation: the passage that the teacher likes best against those of other questions
    TAUGHT="$LENGTHS $TRAINED --select_positive teacher --contrastive_weight 1 --group_size 4 \
--epochs 3"
    READER="--max_length 110 --batch_size 8 --batch_size_val 64 --epochs 1 --lr 5e-4 \
--num_warmup_steps 20 --dropout 0 --seed $1"
}

make_start() {  # writes OUT/start, an untrained retriever that has seen crops of the corpus
    . "$ROOT/scripts/stages.sh"
    mkdir -p "$OUT"
    stage crops $PYTHON "$ROOT/scripts/make_crops.py" "$CORPUS" --output "$OUT/crops.jsonl" \
        --crops 8 --min_words 2 --max_words 5
    stage start $LAUNCH "$ROOT/train_dense.py" --output_dir "$OUT/start" \
        --train_data "$OUT/crops.jsonl" --query_encoder "$ROOT/toy/bert-tiny" \
        --pooling_method mean $START --resume
}

teach() {  # RECIPE SETTING=VALUE...: without labels
    local recipe=$1
    shift
    env TRAIN="$WORLD/train.json" MODEL="$OUT/start" READER_MODEL="$T5" READER_FLAGS="$READER" \
        RETRIEVER_FLAGS="$TAUGHT" TEST_FLAGS="--batch_size 64" OUT="$OUT/$recipe" "$@" \
        "$ROOT/scripts/$recipe.sh"
}

teach_by_attention() {  # ROUNDS
    teach fid-kd ROUNDS="$1" SCORE_FLAGS="--score_kind attention --batch_size 64"
}

read_first() {  # what needs no retriever
    teach_by_attention 0
    (
    . "$ROOT/scripts/stages.sh"
    OUT=$OUT/gold
    read_contexts gold "$WORLD/gold" json
    )
}

teach_without_labels() {
    teach_by_attention 2
    teach lsr ROUNDS=2 LM="$OUT/fid-kd/reader0" SCORE_FLAGS="--answer best"
}

teach_with_labels() {
    . "$ROOT/scripts/stages.sh"
    TRAIN=$WORLD/labelled.json
    MODEL=$OUT/start
    RANKER_MODEL=$T5  # which can read; a ranker from random weights learns nothing here
    OUT=$OUT/3iter
    HITS=$TEST_HITS
    NEGATIVES=20
    MINING=
    SEARCH_FLAGS="--bf16 false"
    RETRIEVER_FLAGS="$TRAINED --group_size 4 --epochs 3"
    RANKER_FLAGS="$TRAINED --lr 5e-4 --batch_size 16 --group_size 4 --epochs 3"
    DISTILLED_FLAGS="$TRAINED --group_size 8 --epochs 3 --contrastive_weight 1 --stable_distill"
    . "$ROOT/scripts/3iter.sh"
    for name in retriever1 retriever2 retriever3; do
        for split in train dev test; do
            stage "$name-contexts-$split" $LAUNCH "$ROOT/retrieve.py" --corpus "$CORPUS" \
                --query_encoder "$OUT/$name" --index "$OUT/index" --overwrite_index \
                --eval_data "$WORLD/$split.json" --hits "$CONTEXTS" \
                --output "$OUT/$name.$split.jsonl"
        done
        read_contexts "$name" "$OUT/$name" jsonl
    done
}

read_contexts() {  # NAME FILES ENDING: a reader of FILES.SPLIT.ENDING; writes OUT/NAME.em.json
    stage "$1-reader" $LAUNCH "$ROOT/train_epoch.py" "$OUT/$1-reader" "$2.train.$3" "$2.dev.$3" \
        --t5_name "$T5" --num_contexts "$CONTEXTS" $READER --resume
    stage "$1-em" $LAUNCH "$ROOT/test.py" "$OUT/$1-reader" "$2.test.$3" --batch_size 64 \
        --measures "$OUT/$1.em.json"
}

row() {  # NAME RECIPE RETRIEVAL EM
    ROWS+=("$1=$WORK/{seed}/$2/$3.json,$WORK/{seed}/$2/$4.json")
}

. "$ROOT/scripts/lanes.sh"
$PYTHON "$ROOT/toy/world.py" --out "$WORLD" --hard
for seed in $SEEDS; do
    SECONDS=0
    OUT=$WORK/$seed
    set_flags "$seed"
    run_both make_start read_first
    run_both teach_with_labels teach_without_labels
    echo "== seed $seed took $((SECONDS / 60)) min $((SECONDS % 60)) s"
done

ROWS=()
row "BM25" fid-kd retrieval0 em0
row "FiD-KD, round 1" fid-kd retrieval1 em1
row "FiD-KD, round 2" fid-kd retrieval2 em2
row "LSR, round 2" lsr retrieval2 em2
row "DPR, BM25's negatives" 3iter retriever1 retriever1.em
row "DPR, mined negatives" 3iter retriever2 retriever2.em
ROWS+=("a ranker of its first 20=$WORK/{seed}/3iter/ranker.json")
row "distilled from the ranker" 3iter retriever3 retriever3.em
ROWS+=("the gold passages=$WORK/{seed}/gold/gold.em.json")
$PYTHON "$ROOT/scripts/table.py" --columns $COLUMNS em --seeds $SEEDS --json "$WORK/table.json" \
    "${ROWS[@]}"
