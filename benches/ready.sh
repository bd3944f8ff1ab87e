#!/usr/bin/env bash
# Time from `serve` to a ready cluster on the demo model (two workers), then the processor time that the idle cluster
# takes. Usage: benches/ready.sh [PROGRAM] [RUNS]
set -euo pipefail
program="${1:-target/release/conclave}"
runs="${2:-5}"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
ticks() { # of a process and its children, 10 ms each
    local sum=0 t
    for p in "$1" $(ps -o pid= --ppid "$1"); do
        t=$(sed 's/.*) //' "/proc/$p/stat" | awk '{print $12 + $13}')
        sum=$((sum + t))
    done
    echo "$sum"
}
for run in $(seq "$runs"); do
    : >"$log"
    began=$(date +%s%N)
    "$program" serve demo/model --tp 2 --listen 127.0.0.1:0 >"$log" 2>/dev/null &
    server=$!
    until grep -q '^serving on' "$log"; do
        kill -0 "$server" || exit 1
        sleep 0.002
    done
    echo "run $run: ready after $((($(date +%s%N) - began) / 1000000)) ms"
    if [ "$run" = "$runs" ]; then
        sleep 2
        before=$(ticks "$server")
        sleep 20
        echo "idle: $((($(ticks "$server") - before) * 10)) ms of processor time in 20 s"
    fi
    kill -TERM "$server"
    wait "$server"
done
