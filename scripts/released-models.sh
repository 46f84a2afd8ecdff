#!/usr/bin/env bash
# The released readers of FiD and the released retrievers of FiD and DPR, evaluated as they are: the
# quickest check of a machine against published figures.
#
#   scripts/get_data.sh fid-nq fid-tqa dpr-nq-qa dpr-nq-model dpr-nq-hn-model nq-retriever \
#       tqa-retriever nq-reader-base nq-reader-large tqa-reader-base tqa-reader-large
#   scripts/released-models.sh                          # 8 GPUs; it goes on where it was stopped
#   RETRIEVERS= READERS=nq-base scripts/released-models.sh      # one reader: minutes
#   scripts/released-models.sh --toy                    # models in these layouts, embedded world
#
# READERS and RETRIEVERS say which: nq-base, nq-large, tqa-base, tqa-large; dpr-nq, dpr-nq-hn, fid-nq,
# fid-tqa. SPLITS says on what readers are tested: test dev.
#
# Published, EM on test and dev: nq-base 50.1 and 49.2 (minFiD, running it, 50.08 and 49.15 when
# repeated questions count once), nq-large 54.4 and 52.7, tqa-base 69.3 and 68.7, tqa-large 72.5 and
# 72.5 (FiD's README). An answer among the first 1/5/20/100 passages: dpr-nq 46.5/68.6/80.1/86.1 (minDPR's
# README, which runs the released model; DPR's own has 45.9/68.1/80.0/85.9), dpr-nq-hn
# 52.5/72.2/81.3/87.3 (DPR's README), fid-nq -/73.8/84.3/89.3 and fid-tqa -/77.0/83.6/87.7 (FiD's README).
# The exit code is 0 if every figure is at most 0.3 away, and 2 if not: nothing is trained, so that
# rounding is all that may differ (minFiD saw 0.03 between two kinds of GPUs, and vectors are stored in
# float16 here). Readers read 200 tokens of a passage and FiD's retrievers 200, and 40 of a question: the
# READMEs' commands give no lengths, and these are what FiD's and minFiD's scripts then take; readers
# were trained with 250. DPR's retrievers read 256.
#
# It takes minutes per reader and split on 8 GPUs (minFiD: 2 to 5 for nq-base on test), about an hour
# per retriever (minDPR), 33 GB of disk for the vectors of one retriever at a time, 14 GB for FiD's
# records in DATA, beside what is fetched. Not run here.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # started by sh
set -euo pipefail
. "$(dirname "$0")/stages.sh"
read_flags "$@"
OUT=${OUT:-runs/released-models}
DATA=${DATA:-data}
READERS=${READERS-nq-base nq-large tqa-base tqa-large}
RETRIEVERS=${RETRIEVERS-dpr-nq dpr-nq-hn fid-nq fid-tqa}
SPLITS=${SPLITS:-test dev}
CONTEXTS=${CONTEXTS:-100}
READER_FLAGS=${READER_FLAGS:---max_length 200 --batch_size 12 --num_workers 2}
SEARCH_FLAGS=${SEARCH_FLAGS:---num_workers 2}
CORPUS=$DATA/psgs_w100.tsv.gz
TOLERANCE=0.3
if [ "$TOY" ]; then
    SPLITS=test READERS="nq-base tqa-large" RETRIEVERS="dpr-nq fid-nq"
    make_published fid-nq fid-tqa dpr-nq dpr-nq-qa
    make_released_models
    CONTEXTS=5 READER_FLAGS="--max_length 110 --batch_size 64 --t5_name $T5"
    SEARCH_FLAGS=
    TOLERANCE=8
fi

published_em() {  # READER SPLIT
    case ${TOY:+toy-}$1-$2 in
        nq-base-test) echo 50.08 ;;
        nq-base-dev) echo 49.15 ;;
        nq-large-test) echo 54.4 ;;
        nq-large-dev) echo 52.7 ;;
        tqa-base-test) echo 69.3 ;;
        tqa-base-dev) echo 68.7 ;;
        tqa-large-*) echo 72.5 ;;
        toy-*) echo 83.5 ;;
        *) echo "error: $1: no reader is named so; see the head of $0" >&2; exit 1 ;;
    esac
}

published_top() {  # RETRIEVER: at 1, 5, 20 and 100
    case ${TOY:+toy-}$1 in
        dpr-nq) echo 46.5 68.6 80.1 86.1 ;;
        dpr-nq-hn) echo 52.5 72.2 81.3 87.3 ;;
        fid-nq) echo none 73.8 84.3 89.3 ;;
        fid-tqa) echo none 77.0 83.6 87.7 ;;
        toy-dpr-*) echo 61 95 99 100 ;;
        toy-fid-*) echo 25 77 97 100 ;;
        *) echo "error: $1: no retriever is named so; see the head of $0" >&2; exit 1 ;;
    esac
}

reader_folder() {  # READER
    echo "$DATA/${1%-*}_reader_${1#*-}"
}

settle_retriever() {  # RETRIEVER: sets its model, the questions, and the flags of its texts
    local dataset=${1#fid-}
    questions=$DATA/nq-test.qa.csv
    texts=(--key_template "{title} [SEP] {text}")
    case $1 in
        dpr-nq) model=$DATA/hf_bert_base.cp ;;
        dpr-nq-hn) model=$DATA/hf_bert_base.hn.cp ;;
        fid-*)  # their texts have the reader's marks, and the lengths of FiD's code
            model=$DATA/${dataset}_retriever
            questions=$DATA/${dataset^^}/test.json
            texts=(--query_template "question: {query}" --query_max_length 40
                   --key_template "title: {title} context: {text}" --key_max_length 200) ;;
    esac
}

# what is misspelt or missing is reported before anything is run
for reader in $READERS; do
    published_em "$reader" test > /dev/null
    need_file "$(reader_folder "$reader")" \
        "scripts/get_data.sh ${reader%-*}-reader-${reader#*-} fetches it"
done
for retriever in $RETRIEVERS; do
    published_top "$retriever" > /dev/null
    settle_retriever "$retriever"
    need_file "$model" "scripts/get_data.sh fetches it, see the head of $0"
    if [[ $retriever == dpr-* ]]; then
        need_file "$questions" "scripts/get_data.sh dpr-nq-qa fetches it"
    fi
done
gigabytes=1
if [ "$RETRIEVERS" ]; then
    need_file "$CORPUS" "scripts/get_data.sh passages fetches it"
    gigabytes=35
fi
need_disk $gigabytes "$OUT"
RECORDS=()
for dataset in nq tqa; do
    if [[ " $READERS" == *" $dataset-"* || " $RETRIEVERS" == *" fid-$dataset"* ]]; then
        need_records $dataset
        RECORDS+=($dataset)
    fi
done

for dataset in "${RECORDS[@]}"; do
    stage "records-$dataset" $PYTHON "$ROOT/scripts/fid_data.py" $dataset --data "$DATA"
done

for reader in $READERS; do
    dataset=${reader%-*}
    for split in $SPLITS; do
        stage "$reader-$split" $LAUNCH "$ROOT/test.py" "$(reader_folder "$reader")" \
            "$DATA/${dataset^^}/$split.json" --num_contexts "$CONTEXTS" $READER_FLAGS \
            --measures "$OUT/$reader.$split.json" --gpus "$GPUS"
        expect "FiD $reader, $split EM" "$OUT/$reader.$split.json" em \
            "$(published_em "$reader" "$split")" $TOLERANCE
    done
done

for retriever in $RETRIEVERS; do
    settle_retriever "$retriever"
    stage "$retriever" $LAUNCH "$ROOT/retrieve.py" --query_encoder "$model" "${texts[@]}" \
        --corpus "$CORPUS" --index "$OUT/index" --overwrite_index --eval_data "$questions" \
        --hits 100 --metrics nq --cutoffs 1 5 20 100 --measures "$OUT/$retriever.json" \
        $SEARCH_FLAGS --gpus "$GPUS"
    expect_top "$retriever, test" "$OUT/$retriever.json" $TOLERANCE $(published_top "$retriever")
done
compare
