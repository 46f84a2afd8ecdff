#!/usr/bin/env bash
# Fetches the published data and models: tells what and how large, resumes what was cut off, verifies sizes, unpacks.
#
#   scripts/get_data.sh nq-open passages dpr-nq       # into data/
#   OUT=/big scripts/get_data.sh nq-reader-base       # into /big/
#   BASE_URL=http://mirror/ scripts/get_data.sh ...   # the same paths below another address
#
# Names: nq-open, triviaqa, passages, dpr-nq, dpr-nq-qa, dpr-nq-model, and FiD's nq-reader-base, nq-reader-large, nq-retriever,
# tqa-reader-base, tqa-reader-large, tqa-retriever.
set -euo pipefail
OUT=${OUT:-data}

addresses() {
    local dpr=https://dl.fbaipublicfiles.com/dpr fid=https://dl.fbaipublicfiles.com/FiD/pretrained_models
    local nq=https://raw.githubusercontent.com/google-research-datasets/natural-questions/master/nq_open
    case $1 in
        nq-open) echo $nq/NQ-open.train.jsonl $nq/NQ-open.dev.jsonl ;;
        triviaqa) echo https://nlp.cs.washington.edu/triviaqa/data/triviaqa-unfiltered.tar.gz ;;
        passages) echo $dpr/wikipedia_split/psgs_w100.tsv.gz ;;
        dpr-nq) echo $dpr/data/retriever/biencoder-nq-train.json.gz $dpr/data/retriever/biencoder-nq-dev.json.gz ;;
        dpr-nq-qa) echo $dpr/data/retriever/nq-dev.qa.csv $dpr/data/retriever/nq-test.qa.csv ;;
        dpr-nq-model) echo $dpr/checkpoint/retriever/single/nq/hf_bert_base.cp ;;
        nq-reader-base|nq-reader-large|nq-retriever|tqa-reader-base|tqa-reader-large|tqa-retriever) echo "$fid/${1//-/_}.tar.gz" ;;
        *) echo "error: no data set is named $1; see the head of $0" >&2; return 1 ;;
    esac
}

remote_size() {  # bytes, by the server
    curl -sfLI "$1" | tr -d '\r' | awk 'tolower($1) == "content-length:" {size = $2} END {print size}'
}

[ $# -gt 0 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 1; }
list=()
for name in "$@"; do
    found=$(addresses "$name") || exit 1
    for address in $found; do
        [ -z "${BASE_URL:-}" ] || address=${BASE_URL%/}/${address#*://*/}
        list+=("$address")
    done
done
mkdir -p "$OUT"
for address in "${list[@]}"; do
    size=$(remote_size "$address") || { echo "error: $address cannot be reached; check the network, or give BASE_URL" >&2; exit 1; }
    echo "$address: $((${size:-0} / 1000000)) MB"
done
for address in "${list[@]}"; do
    file=$OUT/$(basename "$address") size=$(remote_size "$address")
    [ "$(stat -c %s "$file" 2>/dev/null || echo 0)" = "$size" ] || curl -fL --retry 5 -C - -o "$file" "$address" || true
    if [ "$(stat -c %s "$file" 2>/dev/null || echo 0)" != "$size" ]; then
        echo "error: $file has $(stat -c %s "$file" 2>/dev/null || echo 0) bytes, $size are wanted; start the same command again" >&2
        exit 1
    fi
    case $file in
        *.tar.gz) tar -xzf "$file" -C "$OUT" ;;
    esac
    echo "$file: whole"
done
