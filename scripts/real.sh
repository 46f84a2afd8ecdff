# Settings and stages that scripts/demo-real.sh and scripts/real-experiments.sh share by sourcing
# this file. All files are in WORK. OUT is the folder of the current stages: WORK or a folder in it.
SPLIT=${SPLIT:-test}
WORK=${OUT:-out/real}
OUT=$WORK
PYTHON=${PYTHON:-python}
LAUNCH=${LAUNCH:-$PYTHON}
GPUS=
export HF_HUB_OFFLINE=1
ALL_THREADS=${OMP_NUM_THREADS:-$(nproc)}                      # of a stage that runs alone
HALF_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + 1) / 2))}      # of each of two stages side by side
. "$(dirname "$0")/stages.sh"
. "$ROOT/scripts/lanes.sh"
need_choice SPLIT dev test check
DOCS=$WORK/docs
CORPUS=$DOCS/corpus.jsonl
MINILM=$WORK/minilm
SMOLLM=$WORK/smollm2
HITS=20            # documents to measure, mine and reorder per question
NUM_SCORED=5       # passages per question for the language model to score
LSR_QUESTIONS=200  # training questions whose passages it scores
LSR_DATA=$WORK/lsr.$LSR_QUESTIONS  # .jsonl, .minilm.jsonl and .minilm.scored.lsr.jsonl

LENGTHS="--query_max_length 32 --key_max_length 256"
RETRIEVER_FLAGS="$LENGTHS --cos_temperature 0.05 --num_warmup_steps 5"
PAIR_FLAGS="$RETRIEVER_FLAGS --lr 3e-5 --batch_size 64 --group_size 1 --epochs 1"
LABEL_FLAGS="$RETRIEVER_FLAGS --lr 1e-4 --batch_size 32 --epochs 2 --mask_duplicates"
DPR_FLAGS="$LABEL_FLAGS --group_size 2"
DISTILL_FLAGS="$LABEL_FLAGS --group_size 4"
RANKER_FLAGS="--ranker --query_max_length 32 --key_max_length 128 --lr 3e-4 --num_warmup_steps 10 \
--batch_size 16 --group_size 4 --epochs 1"
LSR_FLAGS="$LENGTHS --lr 5e-5 --num_warmup_steps 2 --batch_size 16 --group_size $NUM_SCORED \
--epochs 2 --student_temperature 0.05 --teacher_temperature 1"
PROMPT='Documentation: {title} {text}\nQuestion: {question}\nAnswer:'
# two examples, with documents that no question asks for; without them the model explains at length
EXAMPLES='Answer the question about Python with a name or a few words from the documentation.\n\n'\
'Documentation: os.getpid() Return the current process id.\n'\
'Question: how do I learn the number of my running program\nAnswer: os.getpid\n\n'\
'Documentation: list.index(self, value, start=0, stop=9223372036854775807, /) '\
'Return first index of value. Raises ValueError if the value is not present.\n'\
'Question: What error do I get for the position of something that my list does not hold?\n'\
'Answer: ValueError\n\n'
# the template of lm_score.py that agrees with the reader's prompt
SCORE_TEMPLATE=${EXAMPLES}${PROMPT/\{title\} \{text\}/\{key\}}
SCORE_TEMPLATE="${SCORE_TEMPLATE/\{question\}/\{query\}} {answer}"
# passages are weighted by the softmax of their retrieval scores, as in REPLUG (section 3.2)
ANSWER_FLAGS="--answer_maxlength 16 --passage_weights score --retriever_temperature 0.05"
GOLD_FLAGS="--num_contexts 1 --passage_weights equal"
READER_FLAGS="--lora 8 --lr 1e-3 --num_warmup_steps 3 --batch_size 2 --grad_accumulation 4 \
--epochs 1 --dropout 0 --max_length 256 --eval_answer_maxlength 16 --batch_size_val 16"

# search flags
BM25="--retrieval_method bm25 --k1 1.5 --b 0.75 --overwrite_index"
MINILM_SEARCH="--query_encoder $MINILM --index $WORK/minilm.index --overwrite_index"
search_flags() {  # NAME: of a trained retriever
    echo "--query_encoder $OUT/$1 --version none --index $OUT/$1.index --overwrite_index"
}

train() {  # NAME RECORDS START FLAGS...: a retriever or a ranker, OUT/NAME
    local name=$1 records=$2 start=$3
    shift 3
    stage "$name" $LAUNCH "$ROOT/train_dense.py" --output_dir "$OUT/$name" --train_data $records \
        --query_encoder "$start" --version none --seed "$SEED" "$@" --resume
}

search() {  # STAGE QUESTIONS HITS FLAGS...
    local name=$1 questions=$2 hits=$3
    shift 3
    stage "$name" $LAUNCH "$ROOT/retrieve.py" --corpus "$CORPUS" --eval_data "$questions" \
        --hits "$hits" "$@"
}

measure() {  # NAME FLAGS...: a retriever; writes OUT/NAME.SPLIT.json, .trec and .jsonl
    local name=$1
    shift
    search "$name-$SPLIT" "$DOCS/$SPLIT.jsonl" "$HITS" "$@" --metrics recall mrr --cutoffs 1 5 20 \
        --qrels "qrels=$DOCS/qrels.$SPLIT.tsv" --measures "$OUT/$name.$SPLIT.json" \
        --trec "$OUT/$name.$SPLIT.trec" --output "$OUT/$name.$SPLIT.jsonl"
}

mine() {  # NAME RECORDS FLAGS...: RECORDS.neg.NAME.jsonl has a retriever's first hits as negatives
    local name=$1 records=$2
    shift 2
    search "$name-negatives-$(basename "$records" .jsonl)" "$records" "$HITS" \
        --metrics collate_neg --save_name "$name" "$@"
}

answer() {  # NAME READER QUESTIONS FLAGS...: writes a reader's answers, and their EM and F1
    local name=$1 reader=$2 questions=$3
    shift 3
    stage "$name-$SPLIT" $LAUNCH "$ROOT/test.py" "$reader" "$questions" $ANSWER_FLAGS "$@" \
        --measures "$OUT/$name.$SPLIT.json" --pred "$OUT/$name.$SPLIT.jsonl"
}

score() {  # NAME MODEL CONTEXTS FLAGS...: CONTEXTS.scored.NAME.jsonl has log p(answer | passage)
    local name=$1 model=$2 contexts=$3
    shift 3
    stage "$name-scores" $LAUNCH "$ROOT/lm_score.py" --eval_data "$contexts" --save_name "$name" \
        --model_name_or_path "$model" --likelihood sum --key_max_length 256 "$@"
}

take_first() {  # COUNT FILE NEW: writes the first lines of a file
    head -n "$1" "$2" > "$3.new"
    mv -f "$3.new" "$3"
}

link_input() {  # FILE NEW: what is mined or scored is written beside NEW
    ln -sfn "$(realpath "$1")" "$2"
}

make_data() {  # the documents, the questions and the models
    stage docs $PYTHON "$ROOT/toy/python_docs.py" --out "$DOCS"
    stage models $PYTHON "$ROOT/toy/real_models.py" --out "$WORK"
}
