#!/usr/bin/env bash
# The loop on real words: every method that this repository has, from real pretrained models, on the
# documentation of Python's standard library. One table of retrieval, one of reading.
#
#   scripts/demo-real.sh                    # make demo-real
#   SEEDS="1 2 3" scripts/demo-real.sh      # the retrievers' spread over three seeds
#   SPLIT=dev scripts/demo-real.sh          # the figures by which the settings were chosen
#
# The same command continues where it was stopped. Retrievers start from all-MiniLM-L6-v2, the
# language model is SmolLM2-135M-Instruct. Both come from the package index, and the corpus from the
# Python that runs this (toy/python_docs.py, toy/real_models.py). Two stages run side by side, each
# on half of the cores.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # started by sh
set -euo pipefail
SEEDS=${SEEDS:-1}
SPLIT=${SPLIT:-test}
WORK=${OUT:-out/real}
PYTHON=${PYTHON:-python}
LAUNCH=${LAUNCH:-$PYTHON}
GPUS=
ROOT=$(dirname "$0")/..
DOCS=$WORK/docs
CORPUS=$DOCS/corpus.jsonl
MINILM=$WORK/minilm
SMOLLM=$WORK/smollm2
HITS=20        # what is measured, mined and reordered
SCORED=5       # what the language model scores for each training question
DISK=4
export DISK PYTHON LAUNCH GPUS HF_HUB_OFFLINE=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + 1) / 2))}

LENGTHS="--query_max_length 32 --key_max_length 128 --num_warmup_steps 10"
PAIRS="$LENGTHS --cos_temperature 0.05 --lr 2e-5 --batch_size 64 --group_size 1 --epochs 1"
LABELLED="$LENGTHS --cos_temperature 0.05 --lr 3e-5 --batch_size 16 --group_size 6 --epochs 3 \
--mask_duplicates"
RANKED="$LENGTHS --lr 5e-5 --batch_size 8 --group_size 8 --epochs 3"
DISTILLED="$LENGTHS --cos_temperature 0.05 --lr 3e-5 --batch_size 16 --group_size 8 --epochs 3 \
--contrastive_weight 0.2"
LSR="$LENGTHS --loss kl --lr 2e-5 --batch_size 16 --group_size $SCORED --epochs 2 \
--student_temperature 0.05 --teacher_temperature 1"
READER="--batch_size 1 --grad_accumulation 8 --batch_size_val 16 --epochs 1 --lr 3e-4 \
--num_warmup_steps 5 --dropout 0 --lora 8 --max_length 160 --eval_answer_maxlength 16"

# ---------------------------------------------------------------- stages

train() {  # NAME RECORDS START FLAGS...: a retriever or a ranker, OUT/NAME
    local name=$1 records=$2 start=$3
    shift 3
    stage "$name" $LAUNCH "$ROOT/train_dense.py" --output_dir "$OUT/$name" \
        --train_data "$records" --query_encoder "$start" --version none --seed "$SEED" "$@" --resume
}

search() {  # NAME SPLIT HITS FLAGS...: how a retriever searches for a split's questions
    local name=$1 split=$2 hits=$3
    shift 3
    stage "$name-$split" $LAUNCH "$ROOT/retrieve.py" --corpus "$CORPUS" \
        --eval_data "$DOCS/$split.json" --hits "$hits" "$@"
}

measure() {  # NAME FLAGS...: writes OUT/NAME.SPLIT.json, .trec and .jsonl
    local name=$1
    shift
    search "$name" "$SPLIT" "$HITS" "$@" --metrics recall mrr --cutoffs 1 5 20 \
        --qrels "qrels=$DOCS/qrels.$SPLIT.tsv" --measures "$OUT/$name.$SPLIT.json" \
        --trec "$OUT/$name.$SPLIT.trec" --output "$OUT/$name.$SPLIT.jsonl"
}

use() {  # NAME: the flags that search with a trained retriever
    echo --query_encoder "$OUT/$1" --version none --index "$OUT/$1.index"
}

mine() {  # NAME FLAGS...: writes labelled.neg.NAME.json with a retriever's first hits as negatives
    local name=$1
    shift
    stage "$name-negatives" $LAUNCH "$ROOT/retrieve.py" --corpus "$CORPUS" \
        --eval_data "$OUT/labelled.json" --hits "$HITS" --metrics collate_neg --save_name "$name" "$@"
}

# ---------------------------------------------------------------- without training

make_data() {
    stage docs $PYTHON "$ROOT/toy/python_docs.py" --out "$DOCS"
    stage models $PYTHON "$ROOT/toy/real_models.py" --out "$WORK"
}

search_untrained() {
    measure bm25 --retrieval_method bm25 --k1 1.5 --b 0.75 --index "$OUT/bm25.index"
    measure minilm --query_encoder "$MINILM" --index "$OUT/minilm.index"
    measure fused --retrieval_method fuse --results "$OUT/bm25.$SPLIT.trec" "$OUT/minilm.$SPLIT.trec"
}

# ---------------------------------------------------------------- retrievers

train_retrievers() {
    . "$ROOT/scripts/stages.sh"
    mkdir -p "$OUT"
    ln -sfn "$(realpath "$DOCS/labelled.json")" "$OUT/labelled.json"
    mine bm25 --retrieval_method bm25 --k1 1.5 --b 0.75 --index "$WORK/bm25.index"

    train pairs "$DOCS/pairs.jsonl" "$MINILM" $PAIRS
    measure pairs $(use pairs)
    train dpr1 "$OUT/labelled.neg.bm25.json" "$MINILM" $LABELLED
    measure dpr1 $(use dpr1)
    mine dpr1 $(use dpr1)
    train dpr2 "$OUT/labelled.neg.dpr1.json" "$MINILM" $LABELLED
    measure dpr2 $(use dpr2)
    mine dpr2 $(use dpr2)

    train ranker "$OUT/labelled.neg.dpr2.json" "$MINILM" --ranker $RANKED
    local rank=(--retrieval_method rank --ranker --query_encoder "$OUT/ranker")
    measure ranker "${rank[@]}" --results "$OUT/dpr2.$SPLIT.trec"
    stage ranker-scores $LAUNCH "$ROOT/retrieve.py" "${rank[@]}" \
        --eval_data "$OUT/labelled.neg.dpr2.json" --metrics collate_score --save_name ranker
    train distilled "$OUT/labelled.neg.dpr2.scored.ranker.json" "$MINILM" $DISTILLED
    measure distilled $(use distilled)
}

# ---------------------------------------------------------------- the language model

find_contexts() {  # NAME FLAGS...: a retriever's first passages of the training and dev questions
    local name=$1 split
    shift
    for split in train dev; do
        search "$name-contexts" "$split" "$CONTEXTS" "$@" --output "$OUT/$name.$split.jsonl"
    done
}

teach_by_likelihood() {  # NAME START LM CONTEXTS: a retriever OUT/NAME from START
    stage "$1-scores" $LAUNCH "$ROOT/lm_score.py" --eval_data "$4" --model_name_or_path "$3" \
        --reader --save_name "$1" --likelihood sum
    train "$1" "${4%.jsonl}.scored.$1.jsonl" "$2" $LSR
    measure "$1" $(use "$1")
}

train_reader() {  # NAME START CONTEXTS: a reader OUT/NAME, trained on OUT/CONTEXTS.train.jsonl
    stage "$1" $LAUNCH "$ROOT/train_epoch.py" "$OUT/$1" "$OUT/$3.train.jsonl" "$OUT/$3.dev.jsonl" \
        --t5_name "$2" --num_contexts "$CONTEXTS" --seed "$SEED" $READER --resume
}

answer() {  # NAME READER CONTEXTS COUNT...: EM and F1, OUT/NAME.SPLIT.COUNT.json
    local name=$1 reader=$2 contexts=$3
    shift 3
    stage "$name-$SPLIT" $LAUNCH "$ROOT/test.py" "$reader" "$contexts" --num_contexts "$@" \
        $ANSWER --measures "$OUT/$name.$SPLIT.json" --pred "$OUT/$name.$SPLIT.jsonl"
}

teach_and_read() {
    . "$ROOT/scripts/stages.sh"
    mkdir -p "$OUT"
    local first=$OUT/minilm.$SPLIT.jsonl
    find_contexts minilm --query_encoder "$MINILM" --index "$WORK/minilm.index"
    teach_by_likelihood lsr "$MINILM" "$SMOLLM" "$OUT/minilm.train.jsonl"

    answer untrained "$SMOLLM" "$WORK/minilm.$SPLIT.jsonl" 0 1 3 5
    answer untrained-gold "$SMOLLM" "$DOCS/gold.$SPLIT.json" 1 5
    train_reader reader "$SMOLLM" minilm
    answer reader "$OUT/reader" "$WORK/minilm.$SPLIT.jsonl" 0 1 3 5
    answer reader-gold "$OUT/reader" "$DOCS/gold.$SPLIT.json" 1 5

    # one round of alternation: the trained reader teaches, then learns from what is found
    find_contexts lsr $(use lsr)
    teach_by_likelihood alternated "$OUT/lsr" "$OUT/reader" "$OUT/lsr.train.jsonl"
    find_contexts alternated $(use alternated)
    train_reader reader2 "$OUT/reader" alternated
    answer reader2 "$OUT/reader2" "$OUT/alternated.$SPLIT.jsonl" 1 3 5
}

# ---------------------------------------------------------------- the recipe

row() {  # NAME FOLDER MEASURES: a row of a table; FOLDER is WORK, or WORK/{seed}
    ROWS+=("$1=$2/$3.json")
}

. "$ROOT/scripts/lanes.sh"
(
. "$ROOT/scripts/stages.sh"
OUT=$WORK
make_data
search_untrained
)
for SEED in $SEEDS; do
    SECONDS=0
    OUT=$WORK/$SEED
    run_both train_retrievers teach_and_read
    echo "== seed $SEED took $((SECONDS / 60)) min $((SECONDS % 60)) s"
done

EACH="$WORK/{seed}"
ROWS=()
row "BM25" "$WORK" bm25.$SPLIT
row "MiniLM" "$WORK" minilm.$SPLIT
row "both, fused" "$WORK" fused.$SPLIT
row "MiniLM, first sentences" "$EACH" pairs.$SPLIT
row "DPR, BM25's negatives" "$EACH" dpr1.$SPLIT
row "DPR, mined negatives" "$EACH" dpr2.$SPLIT
row "ranker, on DPR's first $HITS" "$EACH" ranker.$SPLIT
row "distilled from the ranker" "$EACH" distilled.$SPLIT
row "LSR, SmolLM2" "$EACH" lsr.$SPLIT
row "LSR, trained reader" "$EACH" alternated.$SPLIT
$PYTHON "$ROOT/scripts/table.py" --columns recall@1 recall@5 recall@20 mrr@20 --seeds $SEEDS \
    --json "$WORK/retrieval.$SPLIT.json" "${ROWS[@]}"

ROWS=()
row "closed book" "$EACH" untrained.$SPLIT.0
for count in 1 3 5; do
    row "$count of MiniLM's passages" "$EACH" untrained.$SPLIT.$count
done
row "the gold passage" "$EACH" untrained-gold.$SPLIT
row "trained, closed book" "$EACH" reader.$SPLIT.0
for count in 1 3 5; do
    row "trained, $count of MiniLM's" "$EACH" reader.$SPLIT.$count
done
row "trained, the gold passage" "$EACH" reader-gold.$SPLIT
for count in 1 3 5; do
    row "alternated, $count passages" "$EACH" reader2.$SPLIT.$count
done
$PYTHON "$ROOT/scripts/table.py" --columns em f1 --seeds $SEEDS --json "$WORK/reading.$SPLIT.json" \
    "${ROWS[@]}"
