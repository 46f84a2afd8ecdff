# The stages of a recipe, which sources this file. Each runs once; after an interruption, kill -9
# included, the same command continues with the stage that was interrupted.
#
#   . "$(dirname "$0")/stages.sh"
#   stage retriever $LAUNCH "$ROOT/train_dense.py" --output_dir "$OUT/retriever" ... --resume
#
# $OUT/stages/NAME holds a stage's state (running, done or again) and its command, a word a line. A
# stage that was run with another command is never passed over in silence: the recipe stops, and
# REDO=NAME runs this stage and all later ones again. Use one OUT per recipe.
#
# Before the stages a recipe reads its flags (read_flags; --toy is scripts/toy.sh) and checks inputs and
# the disk (need_file, need_disk); at its end it compares what came out with what is published (expect,
# compare). COMPARE=no leaves that out, for other data.

# how the scripts are launched: on 4 GPUs with PROCESSES=4 GPUS=0,1,2,3, on one process without a GPU
# with LAUNCH=python GPUS=. An update is of as many questions as with 8.
GPUS=${GPUS-0,1,2,3,4,5,6,7}
PYTHON=${PYTHON:-python}
if [[ ${LAUNCH:-} == torchrun* ]] && [ -z "${PROCESSES:-}" ]; then
    echo "error: with LAUNCH=torchrun ... give PROCESSES, the number of processes that it starts" >&2
    exit 1
elif [ -n "${LAUNCH:-}" ]; then
    PROCESSES=${PROCESSES:-1}
fi
PROCESSES=${PROCESSES:-8}
LAUNCH=${LAUNCH:-torchrun --standalone --nnodes=1 --nproc_per_node=$PROCESSES}
ROOT=$(dirname "$0")/..

# ---------------------------------------------------------------- before the first stage

TOY=

read_flags() {  # "$@" of the recipe: nothing, or --toy, which runs it on the embedded world
    local flag
    for flag in "$@"; do
        case $flag in
            --toy) TOY=1 ;;
            -h | --help)
                print_head
                exit 0 ;;
            *)
                echo "error: $flag: the one flag is --toy; settings are given as NAME=VALUE before" \
                    "the command, see its head and docs/replication.md:" >&2
                print_head >&2
                exit 1 ;;
        esac
    done
    if [ "$TOY" ]; then
        . "$ROOT/scripts/toy.sh"
    fi
}

print_head() {  # of the recipe: the comment that it begins with
    awk 'NR > 1 && !/^#/ {exit} NR > 1 {sub(/^# ?/, ""); print}' "$0"
}

need_choice() {  # NAME CHOICE...: of a setting
    local name=$1 choice
    shift
    for choice in "$@"; do
        [ "${!name}" != "$choice" ] || return 0
    done
    echo "error: $name is '${!name}'; it must be one of: $*" >&2
    exit 1
}

declare -A MISSING=()  # GB that need_disk has asked for so far, by disk

need_disk() {  # GB FOLDER: room for what will be written there, what it holds already counting
    local needed=${DISK:-${TOY:+1}} folder=$2 free disk held missing
    needed=${needed:-$1}
    if ! [[ $needed =~ ^[0-9]+$ ]]; then
        echo "error: DISK is '$needed'; it must be a number of GB" >&2
        exit 1
    fi
    if [ -n "${DISK:-}" ] && [ "$folder" != "$OUT" ]; then
        return  # DISK is what OUT takes
    fi
    mkdir -p "$folder"
    read -r free disk < <(df -Pk "$folder" | awk 'NR == 2 {printf "%d %s\n", $4 * 1024 / 1e9, $6}')
    held=$(du -sk "$folder/." | awk '{printf "%d", $1 * 1024 / 1e9}')
    missing=$((needed > held ? needed - held : 0))
    MISSING[$disk]=$((${MISSING[$disk]:-0} + missing))
    if ((free < MISSING[$disk])); then
        echo "error: $folder needs $needed GB; it holds $held GB, and its disk has $free GB free, of" \
            "which $((MISSING[$disk] - missing)) are for other folders: make room, give OUT=FOLDER or" \
            "DATA=FOLDER on another disk, or DISK=GB if less will do" >&2
        exit 1
    fi
}

need_records() {  # nq or tqa: FiD's records, or what scripts/fid_data.py makes them of
    local name=${1^^}
    if [ ! -e "$DATA/$name/test.json" ]; then
        for file in "$DATA/$name.test.idx.json" "$DATA/psgs_w100.tsv.gz"; do
            need_file "$file" "scripts/get_data.sh fid-$1 fetches it, DATA names its folder"
        done
    fi
    need_disk 8 "$DATA/$name"
}

share() {  # COUNT: what each process takes of it
    if ! [[ $PROCESSES =~ ^[1-9][0-9]*$ ]] || (($1 % PROCESSES)); then
        echo "error: PROCESSES is '$PROCESSES', and $1, an update's questions or micro-batches, cannot be" \
            "shared out to so many: give 1, 2, 4 or 8, or READER_FLAGS or RETRIEVER_FLAGS of your own" >&2
        exit 1
    fi
    echo $(($1 / PROCESSES))
}

batch() {  # QUERIES of an update: flags of a retriever; on fewer than 8 GPUs in chunks, by GradCache
    local size chunks=
    size=$(share "$1") || exit 1  # set -e does not reach in here
    if ((PROCESSES < 8)); then
        chunks=" --chunk_size 32"
    fi
    echo "--batch_size $size$chunks"
}

need_file() {  # FILE REMEDY
    if [ ! -e "$1" ]; then
        echo "error: $1: no such file; $2" >&2
        exit 1
    fi
}

# ---------------------------------------------------------------- the stages

describe_command() {  # COMMAND...: a word a line, without what may change: launcher, GPUs, --resume
    local word script= before=
    local words=()
    for word in "$@"; do
        if [ -z "$script" ] && [[ $word == *.py ]]; then
            script=$(basename "$word")
            words=("$script")  # what launches it is left out
        elif [ "$word" != --gpus ] && [ "$before" != --gpus ] && [ "$word" != --resume ]; then
            words+=("$word")
        fi
        before=$word
    done
    printf '%q\n' "${words[@]}"
}

mark_stage() {  # MARKER STATE DESCRIPTION: whole or not at all
    local folder=${1%/*} name=${1##*/}
    mkdir -p "$folder"
    printf '%s\n' "$2" "$3" > "$folder/.writing.$name"
    mv -f "$folder/.writing.$name" "$1"
}

first_difference() {  # THEN NOW, descriptions: what differs first, a flag with its value
    local i then now flag=
    mapfile -t then <<< "$1"
    mapfile -t now <<< "$2"
    for ((i = 0; i < ${#now[@]}; i++)); do
        [ "${then[$i]-}" = "${now[$i]}" ] || break
        flag=${now[$i]}
    done
    if [[ $flag == --* ]] && [[ ${now[$i]-} != --* ]]; then
        i=$((i - 1))
    fi
    echo "${then[*]:$i:2}, now ${now[*]:$i:2}"
}

forget_run() {  # COMMAND...: removes the state of an earlier training: --resume would go on with it
    local word before=
    for word in "$@"; do
        if [ "$before" = --output_dir ] || [[ $before == *train_epoch.py ]] \
            || [[ $before == *federate.py ]]; then
            rm -f "$word.state"
        fi
        before=$word
    done
}

REDO_FOLDERS=" "  # those in which redo_stages has looked for the stage REDO
IS_REDONE=

redo_stages() {  # marks the stage REDO in OUT or its folders, and all later ones, to run again
    local marker other
    if [ -z "${REDO:-}" ] || [[ $REDO_FOLDERS == *" $OUT "* ]]; then
        return 0
    fi
    REDO_FOLDERS+="$OUT "
    for marker in "$OUT/stages/$REDO" "$OUT"/*/stages/"$REDO"; do
        [ -e "$marker" ] || continue
        IS_REDONE=1
        for other in "$OUT"/stages/* "$OUT"/*/stages/*; do
            if [ "$other" -nt "$marker" ]; then
                mark_stage "$other" again ""
            fi
        done
        mark_stage "$marker" again ""
    done
}

note_redo() {
    if [ -n "${REDO:-}" ] && [ ! "$IS_REDONE" ]; then
        echo "note: $OUT has no stage named $REDO; nothing was run again" >&2
    fi
}
trap note_redo EXIT

stage() {  # NAME COMMAND...: runs the command, a program, unless it is done
    local name=$1 marker=$OUT/stages/$1 state=new then= now status=0 start=$SECONDS
    shift
    now=$(describe_command "$@")
    redo_stages
    if [ -e "$marker" ]; then
        state=$(head -n 1 "$marker")
        then=$(tail -n +2 "$marker")
    fi

    if [[ " $* " == *" --plan "* ]]; then  # tells what it would cost: not done by that
        echo "== $name"
        "$@" || status=$?
        exit $status
    fi
    if [ "$state" = done ] || [ "$state" = running ]; then
        if [ "$then" != "$now" ]; then
            echo "error: stage $name in $OUT was run with other settings" \
                "($(first_difference "$then" "$now")); give another OUT, or REDO=$name to run it" \
                "and all later stages again" >&2
            exit 1
        fi
    fi
    if [ "$state" = done ]; then
        echo "== $name: done before"
        return
    fi
    echo "== $name"
    if [ "$state" = again ]; then
        forget_run "$@"
    fi
    mark_stage "$marker" running "$now"
    "$@" || status=$?
    if [ $status != 0 ]; then
        echo "error: stage $name failed with exit code $status; the same command goes on there" >&2
        [ $status != 2 ] || status=1  # 2 is that of figures that differ
        exit $status
    fi
    mark_stage "$marker" done "$now"
    echo "   $name took $((SECONDS - start)) s"
}

# ---------------------------------------------------------------- what came out

EXPECTED=()

expect() {  # NAME FILE MEASURE PUBLISHED TOLERANCE, see scripts/compare.py
    EXPECTED+=(--result "$@")
}

expect_top() {  # NAME FILE TOLERANCE PUBLISHED...: an answer among the first 1, 5, 20 and 100
    local name=$1 file=$2 tolerance=$3 k
    shift 3
    for k in 1 5 20 100; do
        expect "$name top-$k" "$file" "nq@$k" "$1" "$tolerance"
        shift
    done
}

compare() {  # prints a line per result; ends the recipe with exit code 2 if one is too far off
    # COMPARE=no: the data are others than the published
    [ "${COMPARE:-yes}" = yes ] || return 0
    $PYTHON "$ROOT/scripts/compare.py" ${TOY:+--toy} "${EXPECTED[@]}" || exit $?
}
