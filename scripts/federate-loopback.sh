#!/usr/bin/env bash
# A federation on one machine, with all that it has on several: TLS, a key for every client, and each
# client a program of its own. docs/federated.md gives the same commands host by host.
#
#   scripts/federate-loopback.sh a.toml b.toml -- OUT --mode retriever --rounds 5 ... -- FLAGS
#
# A client's file holds what --client of federate.py takes, as TOML, with absolute paths:
#
#   name = "a"
#   data = "/data/a/queries.jsonl"
#
# Behind the first -- stands the command line of federate.py, without its flags of simulation. OUT is
# relative to the folder that this is called in. Certificates, keys and logs lie in FOLDER. A client
# that ends is started again; everything ends with the run, also when it is interrupted.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # started by sh
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/.." && pwd)
PYTHON=${PYTHON:-python}
PAUSE=${PAUSE:-5}  # seconds before a client that ended is started again

stop_with_error() {  # TEXT
    echo "error: $1" >&2
    exit 1
}

clients=()
while [ $# != 0 ] && [ "$1" != -- ]; do
    [ -e "$1" ] || stop_with_error "$1: no such file; give each client's file, then -- and the flags"
    clients+=("$1")
    shift
done
if [ ${#clients[@]} = 0 ] || [ $# -lt 2 ]; then
    stop_with_error "give the clients' files, -- and the flags of federate.py: a.toml b.toml -- OUT ..."
fi
shift
FOLDER=${FOLDER:-$1.flower}
mkdir -p "$FOLDER"
FOLDER=$(cd "$FOLDER" && pwd)

# Flower starts its own programs by their names, so that they must be found
PATH=$("$PYTHON" -c 'import sys; print(sys.prefix)')/bin:$PATH
for program in flower-superlink openssl ssh-keygen curl; do
    command -v $program > /dev/null || stop_with_error "$program is not installed; for Flower: \
pip install -r requirements-federated.txt"
done
export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1  # nothing is sent to Flower's makers
export FLWR_LOG_LEVEL=${FLWR_LOG_LEVEL:-WARNING}

free_port() {
    "$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}
PORT=${PORT:-$(free_port)}

# ---------------------------------------------------------------- certificates and keys

make_certificates() {  # ADDRESS...: names, or IP:NUMBER, by which clients reach the superlink
    [ ! -e "$FOLDER/superlink.crt" ] || return 0
    local names
    names=$(IFS=,; echo "$*")
    # the federation's own authority: every host gets ca.crt; ca.key stays with who signs
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-384 -nodes -days 365 \
        -subj "/CN=federation" -addext "keyUsage=critical,keyCertSign" \
        -keyout "$FOLDER/ca.key" -out "$FOLDER/ca.crt" 2>> "$FOLDER/openssl.log"
    # the superlink's certificate, which the authority signs
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-384 -nodes -days 365 \
        -subj "/CN=superlink" -addext "subjectAltName=$names" \
        -addext "basicConstraints=critical,CA:FALSE" \
        -CA "$FOLDER/ca.crt" -CAkey "$FOLDER/ca.key" \
        -keyout "$FOLDER/superlink.key" -out "$FOLDER/superlink.crt" 2>> "$FOLDER/openssl.log"
}

make_node_key() {  # NAME: NAME.key stays on the client's host, NAME.key.pub goes to the superlink's
    [ -e "$FOLDER/$1.key" ] ||
        ssh-keygen -q -t ecdsa -b 384 -N "" -C "$1" -f "$FOLDER/$1.key"
}

# ---------------------------------------------------------------- superlink and clients

start_superlink() {
    FLWR_HOME=$FOLDER/superlink flower-superlink --host 127.0.0.1 --port "$PORT" \
        --ssl-certfile "$FOLDER/superlink.crt" --ssl-keyfile "$FOLDER/superlink.key" \
        --ssl-ca-certfile "$FOLDER/ca.crt" --enable-supernode-auth \
        --disable-runtime-dependency-installation > "$FOLDER/superlink.log" 2>&1 < /dev/null &
    local superlink=$!
    until curl -s --cacert "$FOLDER/ca.crt" "https://127.0.0.1:$PORT/health" > /dev/null; do
        kill -0 $superlink 2> /dev/null ||
            stop_with_error "the superlink did not start; see $FOLDER/superlink.log"
        sleep 0.2
    done
}

name_superlink() {  # where the flwr commands find it, under the name "federation"
    mkdir -p "$FOLDER/superlink"
    cat > "$FOLDER/superlink/config.toml" << END
[superlink.federation]
address = "127.0.0.1:$PORT"
root-certificates = "$FOLDER/ca.crt"
END
}

ask_superlink() {  # flwr's ARGUMENTS...
    FLWR_HOME=$FOLDER/superlink flwr "$@" < /dev/null
}

register_node() {  # NAME: from now on the superlink lets in whoever holds this key
    ask_superlink supernode register "$FOLDER/$1.key.pub" federation >> "$FOLDER/superlink.log" 2>&1 ||
        stop_with_error "client $1 could not be registered; see $FOLDER/superlink.log"
}

start_supernode() {  # NAME FILE PORT: a client, which ends with the exit code of its program
    FLWR_HOME=$FOLDER/$1 flower-supernode --superlink "127.0.0.1:$PORT" \
        --root-certificates "$FOLDER/ca.crt" --auth-supernode-private-key "$FOLDER/$1.key" \
        --node-config "$2" --port "$3" >> "$FOLDER/$1.log" 2>&1 < /dev/null &
    echo $! > "$FOLDER/$1.pid"
    wait $!
}

keep_supernode() {  # NAME FILE PORT: a client, started again as often as it ends
    # After kill -9 the superlink refuses the same key for up to a minute, until it has missed the
    # client's sign of life twice: this is tried until it is let in.
    local code
    while true; do
        code=0
        start_supernode "$@" || code=$?
        echo "note: client $1 ended with code $code; it is started again (see $FOLDER/$1.log)" >&2
        sleep "$PAUSE"
    done
}

# ---------------------------------------------------------------- the run

write_run_config() {  # WORDS...: the command line as one value of TOML, whatever its words hold
    "$PYTHON" - "$@" > "$FOLDER/run.toml" << END
import json, shlex, sys
print("flags =", json.dumps(shlex.join(sys.argv[1:]), ensure_ascii=False))
END
}

start_run() {  # prints the server's lines until the run ends; fails if the run did
    local run
    ask_superlink run "$ROOT" federation --stream -c "$FOLDER/run.toml" | tee "$FOLDER/run.log"
    run=$(sed -n 's/.*started run \([0-9]*\).*/\1/p' "$FOLDER/run.log")
    # flwr's own exit code is 0 for a failed run, too
    ask_superlink list federation --run-id "$run" --format json | "$PYTHON" -c '
import json, sys
run = json.load(sys.stdin)["runs"][0]
if run["status"] != "finished:completed":
    sys.exit("error: the run ended as " + run["status"] + ": " + run["status-details"])'
}

list_descendants() {  # PROCESS: all that it started, parents first
    local child
    for child in $(pgrep -P "$1"); do
        echo "$child"
        list_descendants "$child"
    done
}

stop_all() {
    trap - EXIT INT TERM HUP
    local processes process i
    processes=$(list_descendants $$)
    for process in $processes; do  # a client's worker, which is no descendant, names its supernode
        processes+=" $(pgrep -f "federate\.py --worker .* $process\$" || true)"
    done
    kill $processes 2> /dev/null || true
    for ((i = 0; i < 100; i++)); do
        kill -0 $processes 2> /dev/null || return 0  # none of them is left
        sleep 0.1
    done
    kill -9 $processes 2> /dev/null || true
}
trap stop_all EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

umask 077  # keys are for their owner alone
make_certificates IP:127.0.0.1 DNS:localhost
name_superlink
start_superlink
for file in "${clients[@]}"; do
    name=$(basename "$file" .toml)
    make_node_key "$name"
    register_node "$name"
    keep_supernode "$name" "$(realpath "$file")" "$(free_port)" &
done
write_run_config "$@"
start_run &  # in the background: bash would note an interruption only after it
wait $!
