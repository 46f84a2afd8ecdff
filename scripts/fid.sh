# What scripts/nq.sh and scripts/tqa.sh share: Fusion-in-Decoder, from the published questions to exact
# match. They source it, and say before what data (DATASET, NAME), after it what is published for the
# SIZE and the PASSAGES (DEV_EM, TEST_EM), and where DPR's passages come from (RESULTS or RETRIEVER).
#
#   records     FiD's records of the published questions and passages (scripts/fid_data.py)
#   contexts-*  with PASSAGES=dpr and no RESULTS: the passages that RETRIEVER finds in their place,
#               by the vectors in INDEX, where they are kept
#   reader      training; the checkpoint with the highest EM on dev is kept
#   test        EM on test
. "$(dirname "$0")/stages.sh"
read_flags "$@"
SIZE=${SIZE:-base}
PASSAGES=${PASSAGES:-kd}
need_choice SIZE base large
need_choice PASSAGES kd dpr
OUT=${OUT:-runs/$DATASET-$SIZE-$PASSAGES}
DATA=${DATA:-data}
TOLERANCE=1.0
if [ "$TOY" ]; then
    MODEL=$T5 READER_FLAGS=$TOY_READER CONTEXTS=5
fi
CONTEXTS=${CONTEXTS:-100}
MODEL=${MODEL:-t5-$SIZE}
case $SIZE in  # 64 questions an update
    base) training="--batch_size 2 --epochs 15 --lr 1e-4" micro_batches=32 gigabytes=8 ;;
    large) training="--batch_size 1 --epochs 12 --lr 5e-5" micro_batches=64 gigabytes=25 ;;
esac
READER_FLAGS=${READER_FLAGS:---max_length 250 --use_checkpoint $training \
--grad_accumulation $(share $micro_batches) --accumulate sum --batch_size_val 4 \
--num_warmup_steps 1000 --weight_decay 0.01 --clip 1 --dropout 0.1 --seed 42 --num_workers 3}

train_and_compare() {
    local files=$DATA/$NAME/SPLIT.json split
    if [ "$PASSAGES" = dpr ] && [ -n "${RESULTS:-}" ]; then
        files=$RESULTS
    elif [ "$PASSAGES" = dpr ]; then
        files=$OUT/contexts.SPLIT.jsonl
        gigabytes=$((gigabytes + 45))  # the passages' vectors, and the records with contexts
        need_file "$RETRIEVER" "scripts/get_data.sh $FETCH fetches it; RETRIEVER names another one"
    fi
    need_disk $gigabytes "$OUT"
    if [ "$files" = "${RESULTS:-}" ]; then
        for split in train dev test; do
            need_file "${files/SPLIT/$split}" "scripts/get_data.sh $FETCH fetches it"
        done
    else
        need_records "$DATASET"
        stage records $PYTHON "$ROOT/scripts/fid_data.py" "$DATASET" --data "$DATA"
    fi
    if [ "$files" = "$OUT/contexts.SPLIT.jsonl" ]; then
        for split in train dev test; do
            stage "contexts-$split" $LAUNCH "$ROOT/retrieve.py" --query_encoder "$RETRIEVER" \
                --corpus "$DATA/psgs_w100.tsv.gz" --index "${INDEX:-$OUT/index}" --hits "$CONTEXTS" \
                --eval_data "$DATA/$NAME/$split.json" --output "${files/SPLIT/$split}" \
                --key_template "{title} [SEP] {text}" --num_workers 2 --gpus "$GPUS"
        done
    fi
    stage reader $LAUNCH "$ROOT/train_epoch.py" "$OUT/reader" "${files/SPLIT/train}" \
        "${files/SPLIT/dev}" --t5_name "$MODEL" --num_contexts "$CONTEXTS" $READER_FLAGS \
        ${MORE_FLAGS:-} --resume --gpus "$GPUS"
    stage test $LAUNCH "$ROOT/test.py" "$OUT/reader" "${files/SPLIT/test}" --batch_size 12 \
        --num_workers 2 --pred "$OUT/test.jsonl" --measures "$OUT/test.json" --gpus "$GPUS"

    expect "FiD $SIZE, $NAME test EM" "$OUT/test.json" em "$TEST_EM" "$TOLERANCE"
    expect "FiD $SIZE, $NAME dev EM" "$OUT/reader/args.json" dev_em "$DEV_EM" "$TOLERANCE"
    compare
}
