#!/usr/bin/env bash
# A federation on the embedded world: four clients with questions on other topics train one
# retriever and one reader together, against each client alone and one training on all records.
#
#   scripts/demo-federated.sh                       # make demo-federated
#   SEEDS="1 2 3" scripts/demo-federated.sh         # the spread of three seeds
#   MORE=strategies scripts/demo-federated.sh       # also the retriever by other strategies
#   MORE=privacy scripts/demo-federated.sh          # also the retriever with clipping and noise
#   ALONE=4 OUT=out/alone4 scripts/demo-federated.sh    # clients alone see as much as all together
#
# The same command goes on where it was stopped. The retriever starts from one that has seen crops of
# the corpus and no question, the reader from toy/t5-tiny. A federation and the training on all
# records see the same number of examples, to within one batch a round; a client alone sees what it
# sees in the federation. Two stages run side by side, each on half of the cores.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # started by sh
set -euo pipefail
SEEDS=${SEEDS:-1}
WORK=${OUT:-out/federated}
PYTHON=${PYTHON:-python}
LAUNCH=${LAUNCH:-$PYTHON}
MORE=${MORE:-}
ALONE=${ALONE:-1}
GPUS=
ROOT=$(dirname "$0")/..
BM25="--retrieval_method bm25 --k1 1.5 --b 0.75"  # see scripts/demo-loop.sh
LENGTHS="--query_max_length 32 --key_max_length 110"
CUTOFFS="1 5 20"
CONTEXTS=3              # that the reader reads
CLIENTS=${CLIENTS:-4}
ROUNDS=${ROUNDS:-6}     # of the retriever, half an epoch each
UPDATES=${UPDATES:-10}  # of each client in a round
BATCH=16                # of each client
READER_ROUNDS=${READER_ROUNDS:-4}
READER_UPDATES=${READER_UPDATES:-37}
READER_BATCH=4
# an average of four is a smaller step: 1e-3 is better for the federation, 5e-4 for the others
FEDERATED_LR=1e-3
OTHERS_LR=5e-4
EPOCHS=${EPOCHS:-2}     # that the reader's rounds are, to within an update each
export PYTHON LAUNCH GPUS
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + 1) / 2))}

set_flags() {  # SEED
    START="$LENGTHS --cos_temperature 0.03 --lr 3e-3 --num_warmup_steps 20 --group_size 1 \
--batch_size 64 --epochs 1 --seed $1"
    RETRIEVER="--query_encoder $OUT/retriever-start $LENGTHS --cos_temperature 0.05 --group_size 4 \
--bf16 false --lr 2e-3 --num_warmup_steps 20 --seed $1 --corpus $CORPUS \
--queries $WORLD/queries.dev.jsonl --eval_qrels qrels=$WORLD/qrels.dev.tsv --eval_method retrieval \
--metrics recall --cutoffs $CUTOFFS --best_metric recall@5"
    READER="--t5_name $ROOT/toy/t5-tiny --num_contexts $CONTEXTS --max_length 110 --batch_size_val 64 \
--num_warmup_steps 20 --dropout 0 --seed $1"
}

# ---------------------------------------------------------------- the retriever

make_start() {  # writes OUT/retriever-start, an untrained retriever that has seen crops of the corpus
    stage crops $PYTHON "$ROOT/scripts/make_crops.py" "$CORPUS" --output "$OUT/crops.jsonl" \
        --crops 4 --min_words 2 --max_words 5
    stage retriever-start $LAUNCH "$ROOT/train_dense.py" --output_dir "$OUT/retriever-start" \
        --train_data "$OUT/crops.jsonl" --query_encoder "$ROOT/toy/bert-tiny" \
        --pooling_method mean $START --resume
    cp "$WORLD/labelled.json" "$OUT/labelled.json"
    stage negatives $LAUNCH "$ROOT/retrieve.py" $BM25 --corpus "$CORPUS" --index "$OUT/bm25-index" \
        --eval_data "$OUT/labelled.json" --hits 20 --metrics collate_neg --save_name bm25
}

federate_retriever() {  # NAME FLAGS...: writes OUT/NAME and, of each client, its records
    local name=$1
    shift
    stage "$name" $PYTHON "$ROOT/federate.py" "$OUT/$name" --mode retriever --simulate "$CLIENTS" \
        --data "$OUT/labelled.neg.bm25.json" --split topic --rounds "$ROUNDS" --local_updates "$UPDATES" \
        "$@" --resume -- $RETRIEVER --batch_size $BATCH
    measure_retriever "$name"
}

train_retriever() {  # NAME RECORDS FLAGS...: without a federation
    local name=$1 records=$2
    shift 2
    stage "$name" $LAUNCH "$ROOT/train_dense.py" --output_dir "$OUT/$name" \
        --train_data "$records" $RETRIEVER "$@" --resume
    measure_retriever "$name"
}

measure_retriever() {  # NAME: writes OUT/NAME.json
    stage "$1-test" $LAUNCH "$ROOT/retrieve.py" --query_encoder "$OUT/$1" --corpus "$CORPUS" \
        --index "$OUT/index" --overwrite_index --eval_data "$WORLD/test.json" --hits 20 \
        --qrels "qrels=$WORLD/qrels.test.tsv" --metrics recall --cutoffs $CUTOFFS \
        --measures "$OUT/$1.json"
}

train_retrievers() {
    . "$ROOT/scripts/stages.sh"
    local client steps=$((ROUNDS * UPDATES * ALONE))
    make_start
    measure_retriever retriever-start
    federate_retriever retriever
    train_retriever retriever-central "$OUT/labelled.neg.bm25.json" --batch_size $((CLIENTS * BATCH)) \
        --max_steps $((ROUNDS * UPDATES)) --eval_steps "$UPDATES"
    for ((client = 1; client <= CLIENTS; client++)); do
        train_retriever "retriever-client$client" "$OUT/retriever.clients/client$client.jsonl" \
            --batch_size $BATCH --max_steps $steps --eval_steps $steps
    done
}

# ---------------------------------------------------------------- the reader

federate_readers() {
    . "$ROOT/scripts/stages.sh"
    local split
    for split in train dev test; do
        stage "contexts-$split" $LAUNCH "$ROOT/retrieve.py" $BM25 --corpus "$CORPUS" \
            --index "$OUT/bm25-index-reader" --eval_data "$WORLD/$split.json" --hits $CONTEXTS \
            --output "$OUT/contexts.$split.jsonl"
    done
    stage reader $PYTHON "$ROOT/federate.py" "$OUT/reader" --mode generator --simulate "$CLIENTS" \
        --data "$OUT/contexts.train.jsonl" --split topic --rounds "$READER_ROUNDS" \
        --local_updates "$READER_UPDATES" --resume \
        -- $READER --eval_file "$OUT/contexts.dev.jsonl" --batch_size $READER_BATCH \
        --lr $FEDERATED_LR
    measure_reader reader
    train_reader reader-central "$OUT/contexts.train.jsonl" --batch_size 8 --epochs "$EPOCHS"
}

train_reader() {  # NAME RECORDS FLAGS...: without a federation
    local name=$1 records=$2
    shift 2
    stage "$name" $LAUNCH "$ROOT/train_epoch.py" "$OUT/$name" "$records" "$OUT/contexts.dev.jsonl" \
        $READER --lr $OTHERS_LR "$@" --resume
    measure_reader "$name"
}

measure_reader() {  # NAME: writes OUT/NAME.json
    stage "$1-test" $LAUNCH "$ROOT/test.py" "$OUT/$1" "$OUT/contexts.test.jsonl" --batch_size 64 \
        --measures "$OUT/$1.json"
}

train_alone() {  # FIRST: the readers of every second client from this one on
    . "$ROOT/scripts/stages.sh"
    local client
    for ((client = $1; client <= CLIENTS; client += 2)); do
        train_reader "reader-client$client" "$OUT/reader.clients/client$client.jsonl" \
            --batch_size $READER_BATCH --epochs $((EPOCHS * ALONE))
    done
}

odd_alone() {
    train_alone 1
}

even_alone() {
    train_alone 2
}

# ---------------------------------------------------------------- together

row() {  # LABEL FILE...: a row of the table, of $OUT/FILE.json of every seed
    local name files=
    for name in "${@:2}"; do
        files+=,$WORK/{seed}/$name.json
    done
    ROWS+=("$1=${files#,}")
}

# what MORE adds to the table: label|name|flags of federate.py
STRATEGIES=(
    "FedProx, mu 0.1|retriever-prox|--strategy FedProx proximal_mu=0.1"
    "FedAvgM, momentum 0.5|retriever-avgm|--strategy FedAvgM server_momentum=0.5"
    "FedAdam, eta 0.01|retriever-adam|--strategy FedAdam eta=0.01 tau=0.001"
    "FedMedian|retriever-median|--strategy FedMedian"
)
FIXED="--privacy DifferentialPrivacyServerSideFixedClipping clipping_norm=2 noise_multiplier="
PRIVACY=(
    "clipped to 2, no noise|retriever-noise0|${FIXED}0"
    "noise multiplier 0.001|retriever-noise0.001|${FIXED}0.001"
    "noise multiplier 0.01|retriever-noise0.01|${FIXED}0.01"
    "noise multiplier 1|retriever-noise1|${FIXED}1"
)
case $MORE in
    "") VARIANTS=() ;;
    strategies) VARIANTS=("${STRATEGIES[@]}") ;;
    privacy) VARIANTS=("${PRIVACY[@]}") ;;
    *)
        echo "error: MORE is '$MORE'; it must be strategies or privacy, or empty" >&2
        exit 1
        ;;
esac

federate_variants() {
    . "$ROOT/scripts/stages.sh"
    local variant label name flags
    for variant in "${VARIANTS[@]}"; do
        IFS="|" read -r label name flags <<< "$variant"
        federate_retriever "$name" $flags
    done
}

. "$ROOT/scripts/lanes.sh"
if [ -z "${WORLD:-}" ]; then
    WORLD=$WORK/world
    $PYTHON "$ROOT/toy/world.py" --out "$WORLD" --hard
fi
CORPUS=$WORLD/corpus.tsv
for seed in $SEEDS; do
    SECONDS=0
    OUT=$WORK/$seed
    mkdir -p "$OUT"
    set_flags "$seed"
    run_both train_retrievers federate_readers
    run_both odd_alone even_alone
    echo "== seed $seed took $((SECONDS / 60)) min $((SECONDS % 60)) s"
    if [ "$MORE" ]; then
        (federate_variants)
    fi
done

ROWS=()
row "before training" retriever-start
for ((client = 1; client <= CLIENTS; client++)); do
    row "client $client alone" "retriever-client$client" "reader-client$client"
done
row "federated" retriever reader
row "all records at one place" retriever-central reader-central
for variant in "${VARIANTS[@]}"; do
    IFS="|" read -r label name flags <<< "$variant"
    row "$label" "$name"
done
$PYTHON "$ROOT/scripts/table.py" --columns recall@1 recall@5 recall@20 em --seeds $SEEDS \
    --json "$WORK/table.json" "${ROWS[@]}"
