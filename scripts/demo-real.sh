#!/usr/bin/env bash
# The loop on real words: retrievers and readers from real pretrained models, on the documentation of
# Python's standard library. One table of retrieval and one of reading.
#
#   scripts/demo-real.sh                    # make demo-real
#   ALL=yes scripts/demo-real.sh            # every method of this repository, with the same models
#   SPLIT=dev scripts/demo-real.sh          # the same models on the dev questions
#   SEEDS="1 2 3" scripts/demo-real.sh      # DPR and LSR: mean and spread of three seeds
#
# The same command continues where it was stopped. Retrievers start from all-MiniLM-L6-v2, the
# language model is SmolLM2-135M-Instruct. Both come from the package index, and the corpus from the
# Python that runs this (toy/python_docs.py, toy/real_models.py). Two stages run side by side, each
# on half of the cores. scripts/real.sh has the settings.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # started by sh
set -euo pipefail
ALL=${ALL:-no}
SEEDS=${SEEDS:-1}
READER_QUESTIONS=120  # training questions that the reader learns from
TAUGHT_QUESTIONS=160  # training questions whose passages the trained reader scores
RANKER_PAIRS=1200     # first sentences that the ranker learns from, besides the questions
RANKED_NEGATIVES=8    # documents per question that the ranker scores for the distillation
. "$(dirname "$0")/real.sh"
need_choice ALL no yes
FIRST=${SEEDS%% *}

# ---------------------------------------------------------------- what needs no training

search_untrained() {
    measure bm25 $BM25 --index "$WORK/bm25.index"
    measure minilm $MINILM_SEARCH
    measure fused --retrieval_method fuse \
        --results "$OUT/bm25.$SPLIT.trec" "$OUT/minilm.$SPLIT.trec"
    take_first "$LSR_QUESTIONS" "$DOCS/train.jsonl" "$LSR_DATA.jsonl"
    search minilm-taught "$LSR_DATA.jsonl" "$NUM_SCORED" $MINILM_SEARCH \
        --output "$LSR_DATA.minilm.jsonl"
}

score_passages() {  # given each of MiniLM's passages, how likely is the answer?
    OUT=$WORK score lsr "$SMOLLM" "$LSR_DATA.minilm.jsonl" --template "$SCORE_TEMPLATE"
}

read_untrained() {  # NAME QUESTIONS FLAGS...
    local name=$1 questions=$2
    shift 2
    OUT=$WORK answer "$name" "$SMOLLM" "$questions" "$@" --max_length 400 \
        --prompt_template "$EXAMPLES$PROMPT"
}

# ---------------------------------------------------------------- retrievers

train_and_measure() {  # NAME FLAGS..., see train: a retriever
    train "$@"
    measure "$1" $(search_flags "$1")
}

train_dpr() {  # on labelled questions: the negatives are BM25's hits, then this retriever's
    local labelled=$OUT/labelled
    link_input "$DOCS/labelled.jsonl" "$labelled.jsonl"
    mine bm25 "$labelled.jsonl" $BM25 --index "$WORK/bm25.index"
    train_and_measure dpr1 "$labelled.neg.bm25.jsonl" "$MINILM" $DPR_FLAGS
    mine dpr1 "$labelled.jsonl" $(search_flags dpr1)
    train_and_measure dpr2 "$labelled.neg.dpr1.jsonl" "$MINILM" $DPR_FLAGS
}

train_lsr() {  # on the language model's likelihoods; no label is used
    local losses=emdr2 loss
    [ "$ALL" = no ] || losses="emdr2 kl"
    for loss in $losses; do
        train_and_measure "lsr-$loss" "$LSR_DATA.minilm.scored.lsr.jsonl" "$MINILM" $LSR_FLAGS \
            --loss "$loss"
    done
}

train_ranker() {
    # 400 questions are too few for a ranker; and if all negatives are top hits, it learns that
    # similar means wrong
    local labelled=$OUT/labelled pairs=$OUT/pairs.$RANKER_PAIRS
    take_first "$RANKER_PAIRS" "$DOCS/pairs.jsonl" "$pairs.jsonl"
    CORPUS=$DOCS/rests.jsonl mine rests "$pairs.jsonl" --hits 50 $BM25 --index "$OUT/rests.index"
    mine top200 "$labelled.jsonl" --hits 200 --max_neg_num 200 $(search_flags dpr2)
    train ranker "$pairs.neg.rests.jsonl $labelled.neg.top200.jsonl" "$MINILM" $RANKER_FLAGS
    local rank="--retrieval_method rank --ranker --query_encoder $OUT/ranker"
    measure ranker $rank --results "$OUT/dpr2.$SPLIT.trec"
    mine top "$labelled.jsonl" --max_neg_num "$RANKED_NEGATIVES" $(search_flags dpr2)
    stage ranker-scores $LAUNCH "$ROOT/retrieve.py" $rank \
        --eval_data "$labelled.neg.top.jsonl" --metrics collate_score --save_name ranker
    train_and_measure distilled "$labelled.neg.top.scored.ranker.jsonl" "$MINILM" $DISTILL_FLAGS
}

# ---------------------------------------------------------------- the reader

# on the gold document and one retrieved passage per question
train_reader() {  # NAME START RETRIEVER INDEX
    local questions=$OUT/reader.$READER_QUESTIONS.jsonl
    take_first "$READER_QUESTIONS" "$DOCS/labelled.jsonl" "$questions"
    take_first 16 "$DOCS/dev.jsonl" "$OUT/reader-dev.jsonl"
    stage "$1" $LAUNCH "$ROOT/train_epoch.py" "$OUT/$1" "$questions" "$OUT/reader-dev.jsonl" \
        --t5_name "$2" --retriever "$3" --corpus "$CORPUS" --index "$4" --num_retrieved 1 \
        --prompt_template "$PROMPT" --seed "$SEED" $READER_FLAGS --resume
}

train_and_read() {
    train_reader reader "$SMOLLM" "$MINILM" "$WORK/minilm.index"
    answer reader "$OUT/reader" "$WORK/minilm.$SPLIT.jsonl" --num_contexts 1
    answer reader-gold "$OUT/reader" "$DOCS/gold.$SPLIT.jsonl" $GOLD_FLAGS
}

alternate() {  # one round: the trained reader teaches the retriever, then learns from its passages
    local taught=$OUT/taught.$TAUGHT_QUESTIONS
    take_first "$TAUGHT_QUESTIONS" "$DOCS/train.jsonl" "$taught.jsonl"
    search lsr-taught "$taught.jsonl" "$NUM_SCORED" $(search_flags lsr-emdr2) \
        --output "$taught.lsr.jsonl"
    score alternated "$OUT/reader" "$taught.lsr.jsonl"
    train_and_measure alternated "$taught.lsr.scored.alternated.jsonl" "$OUT/lsr-emdr2" \
        $LSR_FLAGS --loss emdr2
    train_reader reader2 "$OUT/reader" "$OUT/alternated" "$OUT/alternated.index"
    answer reader2 "$OUT/reader2" "$OUT/alternated.$SPLIT.jsonl" --num_contexts 1 3
}

# ---------------------------------------------------------------- what runs side by side

learn_from_likelihood() {
    score_passages
    train_lsr
    read_untrained untrained "$WORK/minilm.$SPLIT.jsonl" --num_contexts 1
    read_untrained untrained-gold "$DOCS/gold.$SPLIT.jsonl" $GOLD_FLAGS
}

learn_from_labels() {
    train_dpr
    train_and_read
}

rank_and_read_more() {
    train_ranker
    read_untrained untrained-more "$WORK/minilm.$SPLIT.jsonl" --num_contexts 0 3 5
    answer reader-more "$OUT/reader" "$WORK/minilm.$SPLIT.jsonl" --num_contexts 0 3
}

alternate_and_train_on_pairs() {
    alternate
    train_and_measure pairs "$DOCS/pairs.jsonl" "$MINILM" $PAIR_FLAGS
}

# ---------------------------------------------------------------- the recipe

SECONDS=0
need_disk 6 "$WORK"
make_data
export OMP_NUM_THREADS=$ALL_THREADS
search_untrained
export OMP_NUM_THREADS=$HALF_THREADS
for SEED in $SEEDS; do
    OUT=$WORK/$SEED
    mkdir -p "$OUT"
    redo_stages  # before the lanes, which could not tell each other
    if [ "$SEED" = "$FIRST" ]; then
        run_both learn_from_likelihood learn_from_labels
        if [ "$ALL" = yes ]; then
            run_both rank_and_read_more alternate_and_train_on_pairs
        fi
    else
        run_both train_dpr train_lsr
    fi
done

row() {  # NAME MEASURES: a row of a table
    ROWS+=("$1=$WORK/$2.json")
}

row_of_all() {  # NAME MEASURES: the same, with ALL=yes
    [ "$ALL" = no ] || row "$@"
}

ROWS=()
row "BM25" bm25.$SPLIT
row "MiniLM" minilm.$SPLIT
row "both, fused" fused.$SPLIT
row_of_all "first sentences" $FIRST/pairs.$SPLIT
row "DPR, BM25's negatives" {seed}/dpr1.$SPLIT
row "DPR, mined negatives" {seed}/dpr2.$SPLIT
row_of_all "a ranker of DPR's $HITS" $FIRST/ranker.$SPLIT
row_of_all "distilled from the ranker" $FIRST/distilled.$SPLIT
row_of_all "LSR, KL" {seed}/lsr-kl.$SPLIT
row "LSR, EMDR2" {seed}/lsr-emdr2.$SPLIT
row_of_all "LSR, the trained reader" $FIRST/alternated.$SPLIT
$PYTHON "$ROOT/scripts/table.py" --columns recall@1 recall@5 recall@20 mrr@20 --seeds $SEEDS \
    --json "$WORK/retrieval.$SPLIT.json" "${ROWS[@]}"

ROWS=()
row_of_all "closed book" untrained-more.$SPLIT.0
row "1 passage" untrained.$SPLIT
row_of_all "3 passages" untrained-more.$SPLIT.3
row_of_all "5 passages" untrained-more.$SPLIT.5
row "the gold passage" untrained-gold.$SPLIT
row_of_all "trained, closed book" $FIRST/reader-more.$SPLIT.0
row "trained, 1 passage" $FIRST/reader.$SPLIT
row_of_all "trained, 3 passages" $FIRST/reader-more.$SPLIT.3
row "trained, the gold passage" $FIRST/reader-gold.$SPLIT
row_of_all "alternated, 1 passage" $FIRST/reader2.$SPLIT.1
row_of_all "alternated, 3 passages" $FIRST/reader2.$SPLIT.3
$PYTHON "$ROOT/scripts/table.py" --columns em f1 --json "$WORK/reading.$SPLIT.json" "${ROWS[@]}"
echo "== $((SECONDS / 60)) min $((SECONDS % 60)) s"

OUT=$WORK/$FIRST
$PYTHON "$ROOT/ask.py" "$OUT/reader" --corpus "$CORPUS" $(search_flags dpr2) \
    --num_contexts 2 --show 2 <<END
How do I get the part of a file's name after the last dot?
What happens if I remove an item that is not in a set?
run a function again and again, at a fixed interval
END
