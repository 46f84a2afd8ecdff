# Two chains of stages side by side, for the demos' recipes, which source this file.

run_both() {  # FUNCTION FUNCTION: side by side; ends the recipe if one of them fails
    local first second status=0
    ("$1") 2>&1 | sed -u "s/^/$1 | /" &
    first=$!
    ("$2") 2>&1 | sed -u "s/^/$2 | /" &
    second=$!
    wait $first || status=$?
    wait $second || status=$?
    [ $status = 0 ] || exit $status
}

# a script's background jobs ignore SIGINT, so it is passed on to them
trap 'trap - INT TERM; kill 0' INT TERM
