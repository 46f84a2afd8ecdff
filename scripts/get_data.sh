#!/usr/bin/env bash
# Fetches the published data and models: prints what and how large, checks that there is room, resumes
# what was cut off, verifies sizes, unpacks.
#
#   scripts/get_data.sh fid-nq                        # into data/; then scripts/nq.sh
#   OUT=/big scripts/get_data.sh nq-reader-base       # into /big/
#   BASE_URL=http://mirror/ scripts/get_data.sh ...   # the same paths below another address
#
# Names: fid-nq and fid-tqa (all that FiD's own get-data.sh fetches for one of them: questions, splits,
# the ids of 100 passages per question, and Wikipedia's passages), nq-open, triviaqa, passages, dpr-nq,
# dpr-nq-qa, dpr-nq-results (the passages that DPR's retriever finds), DPR's models dpr-nq-model,
# dpr-nq-hn-model (trained on negatives of its own, too) and dpr-multiset-model, FiD's nq-reader-base,
# nq-reader-large, nq-retriever, tqa-reader-base, tqa-reader-large, tqa-retriever, msmarco (MS MARCO's
# passages in BEIR's form), and llm-embedder (16.9 GB: the training and test files of its six tasks with
# their corpora, but for that of conversational search).
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # started by sh
set -euo pipefail
OUT=${OUT:-data}

print_addresses() {  # of the files of one data set
    local dpr=https://dl.fbaipublicfiles.com/dpr
    local fid=https://dl.fbaipublicfiles.com/FiD
    local github=https://raw.githubusercontent.com/google-research-datasets
    case $1 in
        fid-nq)
            print_addresses nq-open
            echo "$fid/data/dataindex.tar.gz"
            echo "$fid/data/nq_passages.tar.gz"
            print_addresses passages ;;
        fid-tqa)
            print_addresses triviaqa
            echo "$fid/data/dataindex.tar.gz"
            echo "$fid/data/tqa_passages.tar.gz"
            print_addresses passages ;;
        nq-open)
            echo "$github/natural-questions/master/nq_open/NQ-open.train.jsonl"
            echo "$github/natural-questions/master/nq_open/NQ-open.dev.jsonl" ;;
        triviaqa)
            echo https://nlp.cs.washington.edu/triviaqa/data/triviaqa-unfiltered.tar.gz ;;
        passages)
            echo $dpr/wikipedia_split/psgs_w100.tsv.gz ;;
        dpr-nq)
            echo $dpr/data/retriever/biencoder-nq-train.json.gz
            echo $dpr/data/retriever/biencoder-nq-dev.json.gz ;;
        dpr-nq-qa)
            echo $dpr/data/retriever/nq-dev.qa.csv
            echo $dpr/data/retriever/nq-test.qa.csv ;;
        dpr-nq-results)
            echo $dpr/data/retriever_results/single/nq-train.json.gz
            echo $dpr/data/retriever_results/single/nq-dev.json.gz
            echo $dpr/data/retriever_results/single/nq-test.json.gz ;;
        dpr-nq-model)
            echo $dpr/checkpoint/retriever/single/nq/hf_bert_base.cp ;;
        dpr-nq-hn-model)
            echo $dpr/checkpoint/retriver/single-adv-hn/nq/hf_bert_base.cp ;;  # spelt so there
        dpr-multiset-model)
            echo $dpr/checkpoint/retriver/multiset/hf_bert_base.cp ;;
        msmarco)
            echo https://public.ukp.informatik.tu-darmstadt.de/thakur/BEIR/datasets/msmarco.zip ;;
        nq-reader-base | nq-reader-large | nq-retriever | tqa-reader-base | tqa-reader-large | tqa-retriever)
            echo "$fid/pretrained_models/${1//-/_}.tar.gz" ;;
        llm-embedder)
            echo https://huggingface.co/datasets/namespace-Pt/projects/resolve/main/llm-embedder.tar.gz ;;
        *)
            echo "error: no data set is named $1; see the head of $0" >&2
            return 1 ;;
    esac
}

local_name() {  # of an address's file: DPR's models have one name for all
    case $1 in
        */multiset/hf_bert_base.cp) echo hf_bert_base.multiset.cp ;;
        */single-adv-hn/nq/hf_bert_base.cp) echo hf_bert_base.hn.cp ;;
        *) basename "$1" ;;
    esac
}

remote_size() {  # bytes, by the server
    curl -sfLI "$1" | tr -d '\r' | awk 'tolower($1) == "content-length:" {size = $2} END {print size}'
}

local_size() {  # bytes, 0 where there is no such file
    stat -c %s "$1" 2>/dev/null || echo 0
}

unpacked_size() {  # bytes that a file of that size takes more once it is unpacked, estimated
    local file=$1 size=$2 tenths=0 unpacked=
    case $file in
        *_reader_*.tar.gz | *_retriever.tar.gz)  # weights hardly shrink
            tenths=12 unpacked=${file%.tar.gz} ;;
        *.tar.gz)  # JSON
            tenths=50 unpacked=${file%.tar.gz} ;;
        *.zip)
            tenths=30 unpacked=${file%.zip} ;;
        */psgs_w100.tsv.gz)  # whatever reads it first writes this file beside it
            tenths=30 unpacked=$file.lines ;;
    esac
    if [ -e "$unpacked" ]; then  # by an earlier run
        tenths=0
    fi
    echo $((size * tenths / 10))
}

gigabytes() {
    awk -v bytes="$1" 'BEGIN {printf "%.1f GB", bytes / 1e9}'
}

if [ $# -eq 0 ] || [ "$1" = -h ] || [ "$1" = --help ]; then  # the head of this file
    sed -n '2,/^set /{s/^# \{0,1\}//p}' "$0"
    exit $(($# == 0))
fi

# all addresses first, so that a misspelt name is reported before anything is fetched
list=()
for name in "$@"; do
    addresses=$(print_addresses "$name") || exit 1
    for address in $addresses; do
        if [ -n "${BASE_URL:-}" ]; then
            address=${BASE_URL%/}/${address#*://*/}
        fi
        case " ${list[*]-} " in
            *" $address "*) ;;  # two data sets share it
            *) list+=("$address") ;;
        esac
    done
done
mkdir -p "$OUT"

# all sizes next, so that a disk that is too small is reported before anything is fetched
sizes=()
to_fetch=0
to_unpack=0
for address in "${list[@]}"; do
    if ! size=$(remote_size "$address"); then
        echo "error: $address cannot be reached; check the network, or give BASE_URL" >&2
        exit 1
    fi
    if [ -z "$size" ]; then
        echo "error: $address: the server does not tell the size; give another BASE_URL" >&2
        exit 1
    fi
    echo "$address: $((size / 1000000)) MB"
    file=$OUT/$(local_name "$address")
    if [ "$(local_size "$file")" -gt "$size" ]; then
        echo "error: $file is larger than what would be fetched; move it away, or give another OUT" >&2
        exit 1
    fi
    sizes+=("$size")
    to_fetch=$((to_fetch + size - $(local_size "$file")))
    to_unpack=$((to_unpack + $(unpacked_size "$file" "$size")))
done
free=$(df -Pk "$OUT" | awk 'NR == 2 {printf "%.0f", $4 * 1024}')
echo "$(gigabytes $to_fetch) to fetch, about $(gigabytes $to_unpack) more once unpacked," \
    "$(gigabytes "$free") free in $OUT"
if [ $((to_fetch + to_unpack)) -gt "$free" ]; then
    echo "error: too little room in $OUT; make room, or give OUT=FOLDER on another disk" >&2
    exit 1
fi

for i in "${!list[@]}"; do
    address=${list[$i]}
    size=${sizes[$i]}
    file=$OUT/$(local_name "$address")
    if [ "$(local_size "$file")" != "$size" ]; then
        curl -fL --retry 5 -C - -o "$file" "$address" || true  # -C -: goes on where it was cut off
    fi
    if [ "$(local_size "$file")" != "$size" ]; then
        echo "error: $file has $(local_size "$file") of $size bytes; start the same command again" >&2
        exit 1
    fi
    case $file in
        *.tar.gz) tar -xzf "$file" -C "$OUT" ;;
        *.zip) ${PYTHON:-python3} -m zipfile -e "$file" "$OUT" ;;
    esac
    echo "$file: whole"
done
