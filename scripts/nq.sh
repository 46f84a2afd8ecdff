#!/usr/bin/env bash
# Fusion-in-Decoder (arXiv 2007.01282) on NaturalQuestions, from the published questions to exact match.
#
#   scripts/get_data.sh fid-nq && scripts/nq.sh       # T5 base, 8 GPUs; the same command goes on
#   SIZE=large scripts/nq.sh                          # where it was stopped
#   scripts/get_data.sh dpr-nq-results && PASSAGES=dpr scripts/nq.sh
#   scripts/nq.sh --toy                               # on the embedded world: a minute on one core
#
# SIZE is base or large. PASSAGES says whose 100 passages are read: kd, those that FiD publishes for
# each question and trained its released readers on, which the retriever that was distilled from a
# reader found (arXiv 2012.04584); or dpr, those that DPR publishes as its retriever's results, in
# place of the paper's, which were found by DPR too.
#
# Published: with kd EM 49.2 on dev and 50.1 on test (base), 52.7 and 54.4 (large): FiD's README, its
# released readers. With dpr 48.2 (base) and 51.4 (large) on test: the paper. The exit code is 0 if
# EM is at most 1.0 away from that, and 2 if not: on 3,610 questions the standard error is 0.83, and
# nobody has published the spread of several seeds.
#
# Recipes: base has minFiD's (15 epochs of 64 questions an update, learning rate 1e-4), large FiD's
# (15,000 updates of 64 questions, 5e-5). An estimated 790 GPU hours of V100s for base: summaries of the
# paper give 425 for 100 passages, and its runs have 10,000 updates, these 18,555; 2,200 for large (3.5
# times the weights). On H100s an estimated 71 for base, without what the GPUs send each other
# (bench/plan.py). 8 GB of disk for base and 25 GB for large, beside 6.6 GB of records and 18 GB of
# Wikipedia in DATA; 14 GB of memory a process (docs/reader.md). Not run here at full size. Written:
# OUT/reader, OUT/test.jsonl.
#
# MODEL is t5-base or t5-large from the hub unless it is set, MORE_FLAGS go to the reader's training: --bf16,
# or --plan, which tells what it will cost and stops; READER_FLAGS take the place of all its settings.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # started by sh
set -euo pipefail
DATASET=nq
NAME=NQ
. "$(dirname "$0")/fid.sh"
case $SIZE-$PASSAGES in
    base-kd) DEV_EM=49.2 TEST_EM=50.1 ;;
    large-kd) DEV_EM=52.7 TEST_EM=54.4 ;;
    base-dpr) DEV_EM=none TEST_EM=48.2 ;;
    large-dpr) DEV_EM=none TEST_EM=51.4 ;;
esac
FETCH=fid-nq
if [ "$PASSAGES" = dpr ]; then
    FETCH=dpr-nq-results
    RESULTS=$DATA/nq-SPLIT.json.gz
fi
if [ "$TOY" ]; then
    make_published fid-nq dpr-nq-results
    DEV_EM=none TEST_EM=83 TOLERANCE=7
fi
train_and_compare
