#!/usr/bin/env bash
# Fetches the published data and models: prints what and how large, resumes what was cut off, verifies
# sizes, unpacks.
#
#   scripts/get_data.sh nq-open passages dpr-nq       # into data/
#   OUT=/big scripts/get_data.sh nq-reader-base       # into /big/
#   BASE_URL=http://mirror/ scripts/get_data.sh ...   # the same paths below another address
#
# Names: nq-open, triviaqa, passages, dpr-nq, dpr-nq-qa, dpr-nq-model, and FiD's nq-reader-base,
# nq-reader-large, nq-retriever, tqa-reader-base, tqa-reader-large, tqa-retriever.
set -euo pipefail
OUT=${OUT:-data}

print_addresses() {  # of the files of one data set
    local dpr=https://dl.fbaipublicfiles.com/dpr
    local fid=https://dl.fbaipublicfiles.com/FiD/pretrained_models
    local github=https://raw.githubusercontent.com/google-research-datasets
    case $1 in
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
        dpr-nq-model)
            echo $dpr/checkpoint/retriever/single/nq/hf_bert_base.cp ;;
        nq-reader-base | nq-reader-large | nq-retriever | tqa-reader-base | tqa-reader-large | tqa-retriever)
            echo "$fid/${1//-/_}.tar.gz" ;;
        *)
            echo "error: no data set is named $1; see the head of $0" >&2
            return 1 ;;
    esac
}

remote_size() {  # bytes, by the server
    curl -sfLI "$1" | tr -d '\r' | awk 'tolower($1) == "content-length:" {size = $2} END {print size}'
}

local_size() {  # bytes, 0 where there is no such file
    stat -c %s "$1" 2>/dev/null || echo 0
}

if [ $# -eq 0 ]; then  # the head of this file
    sed -n '2,/^set /{s/^# \{0,1\}//p}' "$0"
    exit 1
fi

# all addresses first, so that a misspelt name is reported before anything is fetched
list=()
for name in "$@"; do
    addresses=$(print_addresses "$name") || exit 1
    for address in $addresses; do
        if [ -n "${BASE_URL:-}" ]; then
            address=${BASE_URL%/}/${address#*://*/}
        fi
        list+=("$address")
    done
done
mkdir -p "$OUT"

for address in "${list[@]}"; do
    if ! size=$(remote_size "$address"); then
        echo "error: $address cannot be reached; check the network, or give BASE_URL" >&2
        exit 1
    fi
    echo "$address: $((${size:-0} / 1000000)) MB"
done

for address in "${list[@]}"; do
    file=$OUT/$(basename "$address")
    size=$(remote_size "$address")
    if [ "$(local_size "$file")" != "$size" ]; then
        curl -fL --retry 5 -C - -o "$file" "$address" || true  # -C -: goes on where it was cut off
    fi
    if [ "$(local_size "$file")" != "$size" ]; then
        echo "error: $file has $(local_size "$file") of $size bytes; start the same command again" >&2
        exit 1
    fi
    case $file in
        *.tar.gz) tar -xzf "$file" -C "$OUT" ;;
    esac
    echo "$file: whole"
done
