# What --toy sets in every recipe: the embedded world in place of the published data (toy/published.py
# writes it in their forms), the tiny models of toy/ in place of T5 and BERT, sizes that take about a
# minute on one core, one process and no GPU. scripts/stages.sh sources this file; a recipe then has
# the flags of its own below `if [ "$TOY" ]`, and what the embedded world is expected to give: measured
# here with one seed, and a tolerance that is wide enough for another processor.
OUT=${OUT:-out/toy/$(basename "$0" .sh)}
DATA=$OUT/data
GPUS=
if [[ $LAUNCH == torchrun* ]]; then
    LAUNCH=$PYTHON
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
T5=$ROOT/toy/t5-tiny
BERT=$ROOT/toy/bert-tiny
BM25_FLAGS="--k1 1.5 --b 0.75"  # bm25s's, which are better here than 0.9 and 0.4
LENGTHS="--query_max_length 32 --key_max_length 110"
TOY_READER="--max_length 110 --batch_size 8 --batch_size_val 64 --epochs 1 --lr 5e-4 \
--num_warmup_steps 10 --dropout 0"
# for a retriever that starts from random weights
TOY_RETRIEVER="$LENGTHS --pooling_method mean --dense_metric cos --cos_temperature 0.05 \
--batch_size 64 --lr 2e-3 --num_warmup_steps 20 --bf16 false"

make_published() {  # NAME...: data sets, by the names of scripts/get_data.sh, into DATA
    stage data $PYTHON "$ROOT/toy/published.py" "$@" --out "$DATA"
}

make_hard_world() {  # the world of make demo-loop, which is harder to search by words
    stage data $PYTHON "$ROOT/toy/world.py" --hard --questions 400 60 200 --out "$DATA"
    CORPUS=$DATA/corpus.tsv
    TRAIN=$DATA/train.json
    DEV=$DATA/dev.json
    TEST=$DATA/test.json
}

make_three_iterations() {  # the settings of scripts/3iter.sh on the hard world
    make_hard_world
    make_start
    TRAIN=$DATA/labelled.json MODEL=$OUT/start RANKER_MODEL=$OUT/start HITS=20 NEGATIVES=10
    SEARCH_FLAGS="--bf16 false"
    RETRIEVER_FLAGS="$TOY_RETRIEVER --group_size 2 --epochs 3"
    RANKER_FLAGS="$LENGTHS --batch_size 16 --lr 1e-3 --num_warmup_steps 10 --bf16 false --group_size 4 \
--epochs 1"
    DISTILLED_FLAGS="$TOY_RETRIEVER --group_size 4 --epochs 3 --contrastive_weight 1"
}

make_start() {  # writes OUT/start, a retriever that has seen crops of the corpus, and no question
    stage crops $PYTHON "$ROOT/scripts/make_crops.py" "$CORPUS" --output "$OUT/crops.jsonl" \
        --crops 4 --min_words 2 --max_words 5
    stage start $LAUNCH "$ROOT/train_dense.py" --output_dir "$OUT/start" \
        --train_data "$OUT/crops.jsonl" --query_encoder "$BERT" --pooling_method mean $LENGTHS \
        --cos_temperature 0.03 --lr 3e-3 --num_warmup_steps 20 --group_size 1 --batch_size 128 \
        --epochs 1 --resume
}

make_dpr_model() {  # NAME: trains DPR's two encoders for a short time, and writes them as DPR's file
    stage dpr-train $LAUNCH "$ROOT/train_dense.py" --output_dir "$OUT/dpr" \
        --train_data "$DATA/biencoder-nq-train.json.gz" --query_encoder "$BERT" \
        --tie_encoders false --dense_metric ip --pooling_method cls $LENGTHS \
        --key_template "{title} [SEP] {text}" --group_size 2 --batch_size 32 --lr 5e-4 --epochs 6 \
        --num_warmup_steps 20 --bf16 false --resume
    stage "$1" $PYTHON "$ROOT/toy/published.py" "$1" --out "$DATA" --retriever "$OUT/dpr"
}
