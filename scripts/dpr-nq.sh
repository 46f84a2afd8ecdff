#!/usr/bin/env bash
# DPR on NaturalQuestions as minDPR runs it: train, encode, search. 8 GPUs; the data by scripts/get_data.sh dpr-nq dpr-nq-qa passages.
#
# Published (top-1/5/20/100 on test): minDPR 46.3/68.4/79.5/86.2 (seed 42), DPR's code 45.9/68.1/80.0/85.9. Not run here.
set -euo pipefail
DATA=${DATA:-data} OUT=${OUT:-runs/dpr-nq} GPUS=${GPUS-0,1,2,3,4,5,6,7} PROCESSES=${PROCESSES:-8} MODEL=${MODEL:-bert-base-uncased}
TRAIN=${TRAIN:-$DATA/biencoder-nq-train.json.gz} DEV=${DEV:-$DATA/biencoder-nq-dev.json.gz}
CORPUS=${CORPUS:-$DATA/psgs_w100.tsv.gz} TEST=${TEST:-$DATA/nq-test.qa.csv}
LAUNCH=${LAUNCH:-torchrun --standalone --nnodes=1 --nproc_per_node=$PROCESSES}
HERE=$(dirname "$0")/..

$LAUNCH "$HERE/train_dense.py" --output_dir "$OUT/model" --train_data "$TRAIN" --eval_data "$DEV" --query_encoder "$MODEL" --tie_encoders false \
    --dense_metric ip --pooling_method cls --key_template '{title} [SEP] {text}' --pair_types --group_size 2 --batch_size 16 --lr 2e-5 \
    --epochs ${EPOCHS:-40} --num_warmup_steps ${WARMUP:-1237} --weight_decay 0 --clip 2 --eval_steps ${EVAL_STEPS:-460} --resume --gpus "$GPUS"
FIND=(--query_encoder "$OUT/model" --corpus "$CORPUS" --index "$OUT/index" --gpus "$GPUS")
$LAUNCH "$HERE/retrieve.py" "${FIND[@]}" --num_workers 2
$LAUNCH "$HERE/retrieve.py" "${FIND[@]}" --eval_data "$TEST" --hits 100 --output "$OUT/test.json" --metrics nq --cutoffs 1 5 20 100 \
    --measures "$OUT/measures.json"
