# What --toy sets in every recipe: the embedded world in place of the published data (toy/published.py
# writes it in their forms), the tiny models of toy/ in place of T5 and BERT, sizes that take about a
# minute on one core, one process and no GPU. scripts/stages.sh sources this file; a recipe then has
# the flags of its own below `if [ "$TOY" ]`, and what the embedded world is expected to give: measured
# here with one seed, and a tolerance that is wide enough for another processor.
OUT=${OUT:-out/toy/$(basename "$0" .sh)}
DATA=$OUT/data
GPUS=
PROCESSES=1
if [[ $LAUNCH == torchrun* ]]; then
    LAUNCH=$PYTHON
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
QUESTIONS=${QUESTIONS:-600 60 200}  # of train, dev and test
T5=$(realpath "$ROOT/toy/t5-tiny")  # one path, however the recipe is called
BERT=$DATA/bert-base-uncased  # toy/bert-tiny with random weights
BM25_FLAGS="--k1 1.5 --b 0.75"  # bm25s's, which are better here than 0.9 and 0.4
LENGTHS="--query_max_length 32 --key_max_length 110"
TOY_READER="--max_length 110 --batch_size 8 --batch_size_val 64 --epochs 1 --lr 5e-4 \
--num_warmup_steps 10 --dropout 0"
# for a retriever that starts from random weights
TOY_RETRIEVER="$LENGTHS --pooling_method mean --dense_metric cos --cos_temperature 0.05 \
--batch_size 32 --lr 2e-3 --num_warmup_steps 20 --bf16 false"

make_published() {  # NAME...: data sets, by the names of scripts/get_data.sh, into DATA
    stage data $PYTHON "$ROOT/toy/published.py" bert-base-uncased "$@" --out "$DATA" \
        --questions $QUESTIONS
}

make_records() {  # FiD's records of the world, of what make_published fid-nq wrote
    stage records $PYTHON "$ROOT/scripts/fid_data.py" nq --data "$DATA"
}

make_three_iterations() {  # the data and settings of scripts/3iter.sh
    make_published llm-embedder
    DATA=$DATA/llm-embedder
    TRAIN=$DATA/qa/nq/train.json
    TEST=$DATA/qa/nq/test.json
    CORPUS=$DATA/qa/nq/corpus.json
    MODEL=$BERT RANKER_MODEL=$T5 HITS=20 NEGATIVES=10 SEARCH_FLAGS="--bf16 false"
    RETRIEVER_FLAGS="$TOY_RETRIEVER --group_size 2 --epochs 6"
    # the tiny T5 can read one passage; from random weights a ranker learns nothing here
    RANKER_FLAGS="$LENGTHS --batch_size 16 --lr 5e-4 --num_warmup_steps 10 --bf16 false \
--group_size 4 --epochs 3"
    DISTILLED_FLAGS="$TOY_RETRIEVER --group_size 4 --epochs 6 --contrastive_weight 1 --stable_distill"
}

make_dpr_models() {  # NAME...: trains two encoders for a short time, and writes them as DPR's file
    stage dpr-bert $PYTHON "$ROOT/toy/published.py" bert-of-means --out "$DATA"
    stage dpr-train $LAUNCH "$ROOT/train_dense.py" --output_dir "$OUT/dpr" \
        --train_data "$DATA/biencoder-nq-train.json.gz" --query_encoder "$DATA/bert-of-means" \
        --tie_encoders false $TOY_RETRIEVER --pooling_method cls --group_size 2 --epochs 5 \
        --key_template "{title} [SEP] {text}" --resume
    stage dpr-models $PYTHON "$ROOT/toy/published.py" "$@" --out "$DATA" --retriever "$OUT/dpr"
}

make_released_models() {  # a reader and two retrievers, trained for a short time, as released ones
    make_dpr_models dpr-nq-model dpr-nq-hn-model
    stage fid-train $LAUNCH "$ROOT/train_dense.py" --output_dir "$OUT/fid" \
        --train_data "$DATA/biencoder-nq-train.json.gz" --query_encoder "$BERT" $TOY_RETRIEVER \
        --group_size 2 --epochs 4 --query_template "question: {query}" \
        --key_template "title: {title} context: {text}" --resume
    stage fid-models $PYTHON "$ROOT/toy/published.py" nq-retriever tqa-retriever --out "$DATA" \
        --retriever "$OUT/fid"
    make_records
    stage reader-train $LAUNCH "$ROOT/train_epoch.py" "$OUT/reader" "$DATA/NQ/train.json" \
        "$DATA/NQ/dev.json" --t5_name "$T5" --num_contexts 5 $TOY_READER --resume
    stage readers $PYTHON "$ROOT/toy/published.py" nq-reader-base nq-reader-large tqa-reader-base \
        tqa-reader-large --out "$DATA" --reader "$OUT/reader"
}
