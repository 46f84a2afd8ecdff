# What scripts/fid-kd.sh, scripts/lsr.sh and scripts/alternate.sh share; they source it, and say
# before what models and flags. The data are NaturalQuestions', unless DATA, or TRAIN, DEV, TEST and
# CORPUS, name others. The retriever of round 0 is BM25. READER_FLAGS and RETRIEVER_FLAGS take the
# place of a recipe's own; BM25_FLAGS, SEARCH_FLAGS, SCORE_FLAGS and TEST_FLAGS add to what is set.
# QRELS names qrels of TEST, for METRICS other than nq; TEST_HITS are found for its questions, in
# place of HITS. QUERY_TEMPLATE and KEY_TEMPLATE are the retriever's texts, where they are set.
GIGABYTES=${GIGABYTES:-150}
METRICS=${METRICS:-nq}
CUTOFFS=${CUTOFFS:-1 5 20 100}
DATA=${DATA:-data}
TRAIN=${TRAIN:-$DATA/NQ/train.json}
DEV=${DEV:-$DATA/NQ/dev.json}
TEST=${TEST:-$DATA/NQ/test.json}
CORPUS=${CORPUS:-$DATA/psgs_w100.tsv.gz}
for file in "$TRAIN" "$DEV" "$TEST"; do
    need_file "$file" "scripts/get_data.sh fid-nq and scripts/fid_data.py make NQ's; TRAIN, DEV and \
TEST name other files"
done
need_file "$CORPUS" "scripts/get_data.sh passages fetches Wikipedia; CORPUS names another file"
need_disk "$GIGABYTES" "$OUT"

search() {  # ROUND SPLIT: writes contexts.ROUND.SPLIT.jsonl, of test the measures, too
    local round=$1 split=$2 questions=$TRAIN hits=$HITS outputs=()
    local method=(--query_encoder "$OUT/retriever$round" --index "$OUT/index" --overwrite_index)
    if [ "$round" = 0 ]; then
        method=(--retrieval_method bm25 --index "$OUT/bm25-index" ${BM25_FLAGS:-})
    fi
    if [ "$split" = dev ]; then
        questions=$DEV
    elif [ "$split" = test ]; then
        questions=$TEST
        hits=${TEST_HITS:-$HITS}
        outputs=(--metrics $METRICS --cutoffs $CUTOFFS ${QRELS:+--qrels "qrels=$QRELS"} \
            --measures "$OUT/retrieval$round.json")
    fi
    stage "contexts$round-$split" $LAUNCH "$ROOT/retrieve.py" "${method[@]}" --corpus "$CORPUS" \
        --eval_data "$questions" --hits "$hits" --output "$OUT/contexts.$round.$split.jsonl" \
        "${outputs[@]}" ${SEARCH_FLAGS:-} --gpus "$GPUS"
}

search_all() {  # ROUND
    search "$1" train
    search "$1" dev
    search "$1" test
}

train_reader() {  # ROUND: writes readerROUND and emROUND.json
    local contexts=$OUT/contexts.$1
    stage "reader$1" $LAUNCH "$ROOT/train_epoch.py" "$OUT/reader$1" "$contexts.train.jsonl" \
        "$contexts.dev.jsonl" --t5_name "$READER_MODEL" --num_contexts "$CONTEXTS" \
        $READER_FLAGS --resume --gpus "$GPUS"
    stage "em$1" $LAUNCH "$ROOT/test.py" "$OUT/reader$1" "$contexts.test.jsonl" \
        --measures "$OUT/em$1.json" ${TEST_FLAGS:-} --gpus "$GPUS"
}

train_retriever() {  # ROUND RECORDS: writes retrieverROUND; goes on from the last round's
    local round=$1 records=$2 start=$MODEL
    if ((round > 1)); then
        start=$OUT/retriever$((round - 1))
    fi
    stage "retriever$round" $LAUNCH "$ROOT/train_dense.py" --output_dir "$OUT/retriever$round" \
        --train_data "$records" --query_encoder "$start" ${QUERY_TEMPLATE:+--query_template "$QUERY_TEMPLATE"} \
        ${KEY_TEMPLATE:+--key_template "$KEY_TEMPLATE"} $RETRIEVER_FLAGS --resume --gpus "$GPUS"
}

print_rounds() {  # the measures of all rounds, those that there are
    local rows=() round files
    for ((round = 0; round <= ROUNDS; round++)); do
        files=$OUT/retrieval$round.json
        if [ -e "$OUT/em$round.json" ]; then
            files=$files,$OUT/em$round.json
        fi
        if [ -e "$OUT/retrieval$round.json" ]; then
            rows+=("round $round=$files")
        fi
    done
    local metric k columns=()
    for metric in $METRICS; do
        for k in $CUTOFFS; do
            columns+=("$metric@$k")
        done
    done
    $PYTHON "$ROOT/scripts/table.py" --columns "${columns[@]}" em "${rows[@]}"
}
