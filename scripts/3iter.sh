# What scripts/3iter-nq.sh and scripts/3iter-msmarco.sh share: the stages of SimLM (arXiv 2207.02578,
# section 3.2). They source it, and say before what data and which flags.
#
#   retriever 1   contrastive, with negatives that BM25 finds
#   retriever 2   contrastive, with negatives that retriever 1 finds
#   ranker        contrastive within each group, with negatives that retriever 2 finds
#   retriever 3   distilled from the ranker's scores of these (KL) beside a contrastive loss
#
# All retrievers start from MODEL, the ranker from RANKER_MODEL. The ranker is measured on what
# retriever 2 finds. RETRIEVER_FLAGS, RANKER_FLAGS and DISTILLED_FLAGS take the place of a recipe's
# own, SEARCH_FLAGS add to what is set.
#
# Other than in SimLM: its ranker reads groups of 32 (NQ) or 64 passages, learns from a half or a
# quarter of them and with R-Drop; here it reads 16. Its temperature falls at the start (NQ), here it
# is 0.02 from the start. Its NQ runs train on DPR's negatives and its own together.
NEGATIVES=${NEGATIVES:-100}
RANKER_MODEL=${RANKER_MODEL:-google/electra-base-discriminator}
for file in "$TRAIN" "$TEST" "$CORPUS"; do
    need_file "$file" "scripts/get_data.sh llm-embedder fetches LLM-Embedder's data, DATA names its \
folder; TRAIN, TEST and CORPUS name other files"
done

need_disk "${GIGABYTES:-60}" "$OUT"
# what is mined is written beside the questions: in OUT, not among the data
ending=.json
case $TRAIN in *.gz) ending=.json.gz ;; esac
ln -sfn "$(realpath "$TRAIN")" "$OUT/train$ending"

train() {  # NAME RECORDS MODEL FLAGS...: writes OUT/NAME
    local name=$1 records=$2 model=$3
    shift 3
    stage "$name" $LAUNCH "$ROOT/train_dense.py" --output_dir "$OUT/$name" --train_data "$records" \
        --query_encoder "$model" --version none $LENGTHS --cos_temperature 0.02 \
        --num_warmup_steps 1000 --bf16 --num_workers 1 "$@" --resume --gpus "$GPUS"
}

search() {  # STAGE RETRIEVER QUESTIONS FLAGS...; the retriever is one of train's, or bm25
    local name=$1 retriever=$2 questions=$3
    shift 3
    local method=(--query_encoder "$OUT/$retriever" --index "$OUT/index" --bf16 --num_workers 1)
    if [ "$retriever" = bm25 ]; then
        method=(--retrieval_method bm25 --index "$OUT/bm25-index" ${BM25_FLAGS:-})
    fi
    # all retrievers' vectors have one place: those of Wikipedia take 32 GB
    stage "$name" $LAUNCH "$ROOT/retrieve.py" "${method[@]}" --overwrite_index --corpus "$CORPUS" \
        --eval_data "$questions" --hits "$HITS" "$@" ${SEARCH_FLAGS:-} --gpus "$GPUS"
}

MEASURES=(--metrics $METRICS --cutoffs $CUTOFFS ${QRELS:+--qrels "qrels=$QRELS"})

measure() {  # RETRIEVER
    search "$1-test" "$1" "$TEST" "${MEASURES[@]}" --measures "$OUT/$1.json" --trec "$OUT/$1.trec"
}

mine() {  # RETRIEVER: writes train.neg.RETRIEVER.json
    search "$1-negatives" "$1" "$OUT/train$ending" --metrics collate_neg --save_name "$1" \
        --max_neg_num "$NEGATIVES" $MINING
}

measure bm25
mine bm25

train retriever1 "$OUT/train.neg.bm25.json" "$MODEL" $RETRIEVER_FLAGS
measure retriever1
mine retriever1

train retriever2 "$OUT/train.neg.retriever1.json" "$MODEL" $RETRIEVER_FLAGS
measure retriever2
mine retriever2

train ranker "$OUT/train.neg.retriever2.json" "$RANKER_MODEL" --ranker $RANKER_FLAGS
RANK=($LAUNCH "$ROOT/retrieve.py" --retrieval_method rank --ranker --query_encoder "$OUT/ranker"
      --bf16)
stage ranker-test "${RANK[@]}" --results "$OUT/retriever2.trec" --corpus "$CORPUS" \
    --eval_data "$TEST" --hits "$HITS" "${MEASURES[@]}" --measures "$OUT/ranker.json" \
    ${SEARCH_FLAGS:-} --gpus "$GPUS"
stage ranker-scores "${RANK[@]}" --eval_data "$OUT/train.neg.retriever2.json" \
    --metrics collate_score --save_name ranker ${SEARCH_FLAGS:-} --gpus "$GPUS"

train retriever3 "$OUT/train.neg.retriever2.scored.ranker.json" "$MODEL" $DISTILLED_FLAGS
measure retriever3

$PYTHON "$ROOT/scripts/table.py" --columns $COLUMNS "BM25=$OUT/bm25.json" \
    "retriever 1 (negatives of BM25)=$OUT/retriever1.json" \
    "retriever 2 (negatives of retriever 1)=$OUT/retriever2.json" \
    "ranker (on what retriever 2 finds)=$OUT/ranker.json" \
    "retriever 3 (distilled from the ranker)=$OUT/retriever3.json"
