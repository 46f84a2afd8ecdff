# What scripts/nq.sh and scripts/tqa.sh share: Fusion-in-Decoder, from the published questions to exact
# match. They source it, and say before what data (DATASET, NAME), which size and whose passages, and
# what is published.
#
#   records     FiD's records of the published questions and passages (scripts/fid_data.py)
#   contexts-*  with PASSAGES=dpr and no RESULTS: the passages that RETRIEVER finds in their place
#   reader      training; the checkpoint with the highest EM on dev is kept
#   test        EM on test
case $SIZE in
    base) training="--batch_size 2 --grad_accumulation 4 --epochs 15 --lr 1e-4" gigabytes=8 ;;
    large) training="--batch_size 1 --grad_accumulation 8 --epochs 12 --lr 5e-5" gigabytes=25 ;;
esac
MODEL=${MODEL:-t5-$SIZE}
READER_FLAGS=${READER_FLAGS:---max_length 250 --use_checkpoint $training --accumulate sum \
--batch_size_val 4 --num_warmup_steps 1000 --weight_decay 0.01 --clip 1 --dropout 0.1 --seed 42 \
--num_workers 3}
FILES=$DATA/$NAME/SPLIT.json
if [ "$PASSAGES" = dpr ] && [ -n "${RESULTS:-}" ]; then
    FILES=$RESULTS
elif [ "$PASSAGES" = dpr ]; then
    FILES=$OUT/contexts.SPLIT.jsonl
    gigabytes=$((gigabytes + 45))  # the passages' vectors, and the records with contexts
    need_file "$RETRIEVER" "scripts/get_data.sh $FETCH fetches it; RETRIEVER names another one"
fi
need_disk $gigabytes "$OUT"
if [ "$FILES" = "${RESULTS:-}" ]; then
    for split in train dev test; do
        need_file "${FILES/SPLIT/$split}" "scripts/get_data.sh $FETCH fetches it"
    done
else
    need_disk 8 "$DATA"  # FiD's records
    stage records $PYTHON "$ROOT/scripts/fid_data.py" "$DATASET" --data "$DATA"
fi
if [ "$FILES" = "$OUT/contexts.SPLIT.jsonl" ]; then
    for split in train dev test; do
        stage "contexts-$split" $LAUNCH "$ROOT/retrieve.py" --query_encoder "$RETRIEVER" \
            --corpus "$DATA/psgs_w100.tsv.gz" --index "$OUT/index" --hits "$CONTEXTS" \
            --eval_data "$DATA/$NAME/$split.json" --output "${FILES/SPLIT/$split}" \
            --key_template "{title} [SEP] {text}" --num_workers 2 --gpus "$GPUS"
    done
fi
stage reader $LAUNCH "$ROOT/train_epoch.py" "$OUT/reader" "${FILES/SPLIT/train}" \
    "${FILES/SPLIT/dev}" --t5_name "$MODEL" --num_contexts "$CONTEXTS" $READER_FLAGS --resume \
    --gpus "$GPUS"
stage test $LAUNCH "$ROOT/test.py" "$OUT/reader" "${FILES/SPLIT/test}" --batch_size 12 \
    --num_workers 2 --pred "$OUT/test.jsonl" --measures "$OUT/test.json" --gpus "$GPUS"

expect "FiD $SIZE, $NAME test EM" "$OUT/test.json" em "$TEST_EM" "$TOLERANCE"
expect "FiD $SIZE, $NAME dev EM" "$OUT/reader/args.json" dev_em "$DEV_EM" "$TOLERANCE"
compare
