#!/usr/bin/env bash
# DPR on NaturalQuestions as minDPR runs it: train, encode, search, on 8 GPUs.
#
#   scripts/get_data.sh dpr-nq dpr-nq-qa passages     # the data
#   scripts/dpr-nq.sh
#
# Published (top-1/5/20/100 on test): minDPR 46.3/68.4/79.5/86.2 and 45.5/68.9/79.7/86.0 (two seeds);
# DPR's code trained by minDPR's author 46.0/68.2/79.1/86.3; DPR's own README, for its released
# model, 45.9/68.1/80.0/85.9. Not run here.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # started by sh
set -euo pipefail
DATA=${DATA:-data}
OUT=${OUT:-runs/dpr-nq}
MODEL=${MODEL:-bert-base-uncased}
TRAIN=${TRAIN:-$DATA/biencoder-nq-train.json.gz}
DEV=${DEV:-$DATA/biencoder-nq-dev.json.gz}
CORPUS=${CORPUS:-$DATA/psgs_w100.tsv.gz}
TEST=${TEST:-$DATA/nq-test.qa.csv}
GPUS=${GPUS-0,1,2,3,4,5,6,7}
PROCESSES=${PROCESSES:-8}
LAUNCH=${LAUNCH:-torchrun --standalone --nnodes=1 --nproc_per_node=$PROCESSES}
ROOT=$(dirname "$0")/..

# train
$LAUNCH "$ROOT/train_dense.py" --output_dir "$OUT/model" \
    --train_data "$TRAIN" --eval_data "$DEV" --key_template '{title} [SEP] {text}' --pair_types \
    --query_encoder "$MODEL" --tie_encoders false --dense_metric ip --pooling_method cls \
    --group_size 2 --batch_size 16 --lr 2e-5 --epochs "${EPOCHS:-40}" \
    --num_warmup_steps "${WARMUP:-1237}" --weight_decay 0 --clip 2 \
    --eval_steps "${EVAL_STEPS:-460}" --resume --gpus "$GPUS"

# encode the corpus
INDEX=(--query_encoder "$OUT/model" --corpus "$CORPUS" --index "$OUT/index" --gpus "$GPUS")
$LAUNCH "$ROOT/retrieve.py" "${INDEX[@]}" --num_workers 2

# search
$LAUNCH "$ROOT/retrieve.py" "${INDEX[@]}" --eval_data "$TEST" --hits 100 --output "$OUT/test.json" \
    --metrics nq --cutoffs 1 5 20 100 --measures "$OUT/measures.json"
