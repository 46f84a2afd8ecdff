#!/usr/bin/env bash
# The loop on real words: every method that this repository has, from real pretrained models, on the
# documentation of Python's standard library. One table of retrieval and one of reading.
#
#   scripts/demo-real.sh                # make demo-real
#   SPLIT=dev scripts/demo-real.sh      # on the dev questions
#   TAUGHT=400 OUT=out/real400 scripts/demo-real.sh    # the language model learns from all questions
#
# The same command continues where it was stopped. Retrievers start from all-MiniLM-L6-v2, the
# language model is SmolLM2-135M-Instruct. Both come from the package index, and the corpus from the
# Python that runs this (toy/python_docs.py, toy/real_models.py). Two stages run side by side, each
# on half of the cores. The language model takes half of the time although it scores, and learns
# from, only the first TAUGHT training questions.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # started by sh
set -euo pipefail
SEED=${SEED:-1}
SPLIT=${SPLIT:-test}
TAUGHT=${TAUGHT:-120}
OUT=${OUT:-out/real}
PYTHON=${PYTHON:-python}
LAUNCH=${LAUNCH:-$PYTHON}
GPUS=
export HF_HUB_OFFLINE=1
ALONE=${OMP_NUM_THREADS:-$(nproc)}                       # threads of a stage that runs alone
BESIDE=${OMP_NUM_THREADS:-$((($(nproc) + 1) / 2))}       # threads of each of two stages
. "$(dirname "$0")/stages.sh"
. "$ROOT/scripts/lanes.sh"
DOCS=$OUT/docs
CORPUS=$DOCS/corpus.jsonl
MINILM=$OUT/minilm
SMOLLM=$OUT/smollm2
HITS=20      # documents that are measured, mined and reordered
SCORED=5     # passages of a question that the language model scores
RANKER_PAIRS=1200   # first sentences that the ranker learns from, besides the questions
RANKED_NEGATIVES=8  # documents of a question that the ranker scores for the distillation

LENGTHS="--query_max_length 32 --key_max_length 128"
PAIRED="$LENGTHS --cos_temperature 0.05 --lr 3e-5 --num_warmup_steps 5 --batch_size 64 --group_size 1 \
--epochs 1"
LABELLED="$LENGTHS --cos_temperature 0.05 --lr 1e-4 --num_warmup_steps 5 --batch_size 32 \
--group_size 2 --epochs 2 --mask_duplicates"
RANKED="$LENGTHS --lr 3e-4 --num_warmup_steps 10 --batch_size 16 --group_size 4 --epochs 1"
DISTILLED="$LENGTHS --cos_temperature 0.05 --lr 1e-4 --num_warmup_steps 5 --batch_size 32 \
--group_size 4 --epochs 2 --mask_duplicates"
LSR="$LENGTHS --loss kl --lr 5e-5 --num_warmup_steps 2 --batch_size 16 --group_size $SCORED \
--epochs 1 --student_temperature 0.05 --teacher_temperature 1"
PROMPT='Documentation: {title} {text}\nQuestion: {question}\nAnswer:'
# two examples, whose documents no question asks for: without them the model explains at length
EXAMPLES='Answer the question about Python with a name or a few words from the documentation.\n\n'\
'Documentation: os.getpid() Return the current process id.\n'\
'Question: how do I learn the number of my running program\nAnswer: os.getpid\n\n'\
'Documentation: list.index(self, value, start=0, stop=9223372036854775807, /) '\
'Return first index of value. Raises ValueError if the value is not present.\n'\
'Question: What error do I get for the position of something that my list does not hold?\n'\
'Answer: ValueError\n\n'
# passages count by the softmax of their retrieval scores, as in REPLUG (section 3.2)
ANSWER="--answer_maxlength 16 --passage_weights score --retriever_temperature 0.05"
TRAINED="--lora 8 --lr 1e-3 --num_warmup_steps 3 --batch_size 2 --grad_accumulation 4 --epochs 1 \
--dropout 0 --max_length 128 --eval_answer_maxlength 16 --batch_size_val 16"

# ---------------------------------------------------------------- stages

train() {  # NAME RECORDS START FLAGS...: a retriever or a ranker, OUT/NAME
    local name=$1 records=$2 start=$3
    shift 3
    stage "$name" $LAUNCH "$ROOT/train_dense.py" --output_dir "$OUT/$name" --train_data $records \
        --query_encoder "$start" --version none --seed "$SEED" "$@" --resume
}

search() {  # STAGE QUESTIONS HITS FLAGS...
    local name=$1 questions=$2 hits=$3
    shift 3
    stage "$name" $LAUNCH "$ROOT/retrieve.py" --corpus "$CORPUS" --eval_data "$questions" \
        --hits "$hits" "$@"
}

measure() {  # NAME FLAGS...: of a retriever; writes OUT/NAME.SPLIT.json, .trec and .jsonl
    local name=$1
    shift
    search "$name-$SPLIT" "$DOCS/$SPLIT.jsonl" "$HITS" "$@" --metrics recall mrr --cutoffs 1 5 20 \
        --qrels "qrels=$DOCS/qrels.$SPLIT.tsv" --measures "$OUT/$name.$SPLIT.json" \
        --trec "$OUT/$name.$SPLIT.trec" --output "$OUT/$name.$SPLIT.jsonl"
}

mine() {  # NAME RECORDS FLAGS...: RECORDS.neg.NAME.jsonl has a retriever's first hits as negatives
    local name=$1 records=$2
    shift 2
    search "$name-negatives-$(basename "$records" .jsonl)" "$records" "$HITS" --metrics collate_neg \
        --save_name "$name" "$@"
}

first() {  # COUNT FILE NEW: writes the first lines of a file
    head -n "$1" "$2" > "$3.new"
    mv -f "$3.new" "$3"
}

# the flags that search
BM25="--retrieval_method bm25 --k1 1.5 --b 0.75"
UNTAUGHT="--query_encoder $MINILM --index $OUT/minilm.index"
use() {  # NAME: with a trained retriever
    echo "--query_encoder $OUT/$1 --version none --index $OUT/$1.index"
}

# ---------------------------------------------------------------- retrievers

train_retrievers() {
    train pairs "$DOCS/pairs.jsonl" "$MINILM" $PAIRED
    measure pairs $(use pairs)
    mine bm25 "$DOCS/labelled.jsonl" $BM25 --index "$OUT/bm25.index"
    train dpr1 "$DOCS/labelled.neg.bm25.jsonl" "$MINILM" $LABELLED
    measure dpr1 $(use dpr1)
    mine dpr1 "$DOCS/labelled.jsonl" $(use dpr1)
    train dpr2 "$DOCS/labelled.neg.dpr1.jsonl" "$MINILM" $LABELLED
    measure dpr2 $(use dpr2)

    # the questions alone are too few for a ranker, and with only the first hits as negatives it
    # learns that what is similar is wrong
    first "$RANKER_PAIRS" "$DOCS/pairs.jsonl" "$OUT/some-pairs.jsonl"
    CORPUS=$DOCS/rests.jsonl mine rests "$OUT/some-pairs.jsonl" --hits 50 $BM25 \
        --index "$OUT/rests.index"
    mine far "$DOCS/labelled.jsonl" --hits 200 --max_neg_num 200 $(use dpr2)
    train ranker "$OUT/some-pairs.neg.rests.jsonl $DOCS/labelled.neg.far.jsonl" "$MINILM" \
        --ranker $RANKED
    local rank="--retrieval_method rank --ranker --query_encoder $OUT/ranker"
    measure ranker $rank --results "$OUT/dpr2.$SPLIT.trec"
    mine near "$DOCS/labelled.jsonl" --max_neg_num "$RANKED_NEGATIVES" $(use dpr2)
    stage ranker-scores $LAUNCH "$ROOT/retrieve.py" $rank \
        --eval_data "$DOCS/labelled.neg.near.jsonl" --metrics collate_score --save_name ranker
    train distilled "$DOCS/labelled.neg.near.scored.ranker.jsonl" "$MINILM" $DISTILLED
    measure distilled $(use distilled)
}

# ---------------------------------------------------------------- the language model

answer() {  # NAME READER QUESTIONS FLAGS...: EM and F1, and the answers
    local name=$1 reader=$2 questions=$3
    shift 3
    stage "$name-$SPLIT" $LAUNCH "$ROOT/test.py" "$reader" "$questions" $ANSWER "$@" \
        --measures "$OUT/$name.$SPLIT.json" --pred "$OUT/$name.$SPLIT.jsonl"
}

teach_by_likelihood() {  # NAME START CONTEXTS FLAGS...: a retriever, by a language model's scores
    local name=$1 start=$2 contexts=$3
    shift 3
    stage "$name-scores" $LAUNCH "$ROOT/lm_score.py" --eval_data "$contexts" --save_name "$name" \
        --likelihood sum --key_max_length 64 "$@"
    train "$name" "${contexts%.jsonl}.scored.$name.jsonl" "$start" $LSR
    measure "$name" $(use "$name")
}

train_reader() {  # NAME START RETRIEVER: on the gold documents and what the retriever finds
    stage "$1" $LAUNCH "$ROOT/train_epoch.py" "$OUT/$1" "$OUT/labelled.jsonl" "$OUT/chosen.jsonl" \
        --t5_name "$2" --retriever "$OUT/$3" --corpus "$CORPUS" --index "$OUT/$3.index" \
        --num_retrieved 1 --prompt_template "$PROMPT" --seed "$SEED" $TRAINED --resume
}

teach_and_read() {
    local prompt=$EXAMPLES$PROMPT
    local scored=${prompt//\{title\} \{text\}/{key\}}
    scored="${scored//\{question\}/{query\}} {answer}"
    first "$TAUGHT" "$DOCS/train.jsonl" "$OUT/taught.jsonl"
    first "$TAUGHT" "$DOCS/labelled.jsonl" "$OUT/labelled.jsonl"
    first 16 "$DOCS/dev.jsonl" "$OUT/chosen.jsonl"

    search minilm-taught "$OUT/taught.jsonl" "$SCORED" $UNTAUGHT --output "$OUT/minilm.taught.jsonl"
    teach_by_likelihood lsr "$MINILM" "$OUT/minilm.taught.jsonl" --model_name_or_path "$SMOLLM" \
        --template "$scored"

    local untrained=(--max_length 400 --prompt_template "$prompt")
    answer untrained "$SMOLLM" "$OUT/minilm.$SPLIT.jsonl" "${untrained[@]}" --num_contexts 0 1 3 5
    answer untrained-gold "$SMOLLM" "$DOCS/gold.$SPLIT.jsonl" "${untrained[@]}" --num_contexts 1 \
        --passage_weights equal
    train_reader reader "$SMOLLM" minilm
    answer reader "$OUT/reader" "$OUT/minilm.$SPLIT.jsonl" --num_contexts 0 1 3 5
    answer reader-gold "$OUT/reader" "$DOCS/gold.$SPLIT.jsonl" --num_contexts 1 \
        --passage_weights equal

    # one round of alternation: the trained reader teaches the retriever, and goes on with it
    search lsr-taught "$OUT/taught.jsonl" "$SCORED" $(use lsr) --output "$OUT/lsr.taught.jsonl"
    teach_by_likelihood alternated "$OUT/lsr" "$OUT/lsr.taught.jsonl" \
        --model_name_or_path "$OUT/reader"
    train_reader reader2 "$OUT/reader" alternated
    answer reader2 "$OUT/reader2" "$OUT/alternated.$SPLIT.jsonl" --num_contexts 1 3 5
}

# ---------------------------------------------------------------- the recipe

row() {  # NAME MEASURES: a row of a table
    ROWS+=("$1=$OUT/$2.json")
}

SECONDS=0
need_disk 6 "$OUT"
stage docs $PYTHON "$ROOT/toy/python_docs.py" --out "$DOCS"
stage models $PYTHON "$ROOT/toy/real_models.py" --out "$OUT"
export OMP_NUM_THREADS=$ALONE
measure bm25 $BM25 --index "$OUT/bm25.index"
measure minilm $UNTAUGHT
measure fused --retrieval_method fuse --results "$OUT/bm25.$SPLIT.trec" "$OUT/minilm.$SPLIT.trec"
export OMP_NUM_THREADS=$BESIDE
run_both train_retrievers teach_and_read

ROWS=()
row "BM25" bm25.$SPLIT
row "MiniLM" minilm.$SPLIT
row "both, fused" fused.$SPLIT
row "first sentences" pairs.$SPLIT
row "DPR, BM25's negatives" dpr1.$SPLIT
row "DPR, mined negatives" dpr2.$SPLIT
row "a ranker of DPR's $HITS" ranker.$SPLIT
row "distilled from the ranker" distilled.$SPLIT
row "LSR, SmolLM2" lsr.$SPLIT
row "LSR, the trained reader" alternated.$SPLIT
$PYTHON "$ROOT/scripts/table.py" --columns recall@1 recall@5 recall@20 mrr@20 \
    --json "$OUT/retrieval.$SPLIT.json" "${ROWS[@]}"

ROWS=()
row "closed book" untrained.$SPLIT.0
row "1 passage" untrained.$SPLIT.1
row "3 passages" untrained.$SPLIT.3
row "5 passages" untrained.$SPLIT.5
row "the gold passage" untrained-gold.$SPLIT
row "trained, closed book" reader.$SPLIT.0
row "trained, 1 passage" reader.$SPLIT.1
row "trained, 3 passages" reader.$SPLIT.3
row "trained, 5 passages" reader.$SPLIT.5
row "trained, the gold passage" reader-gold.$SPLIT
row "alternated, 1 passage" reader2.$SPLIT.1
row "alternated, 3 passages" reader2.$SPLIT.3
row "alternated, 5 passages" reader2.$SPLIT.5
$PYTHON "$ROOT/scripts/table.py" --columns em f1 --json "$OUT/reading.$SPLIT.json" "${ROWS[@]}"
echo "== $((SECONDS / 60)) min $((SECONDS % 60)) s"

$PYTHON "$ROOT/ask.py" "$OUT/reader2" --corpus "$CORPUS" $(use alternated) --num_contexts 3 \
    --show 2 <<END
How do I get the part of a file's name after the last dot?
What happens if I remove an item that is not in a set?
run a function again and again, at a fixed interval
END
