#!/usr/bin/env bash
# Several streams of GGUF files here and in llama.cpp, in turn: benches/streams.sh LLAMA_SERVER MODEL.gguf... Two threads each, 8 and 16
# streams, 100 tokens in and 64 out, no two prompts alike. Prints a line a model and number of streams: medians of ROUNDS in generated
# tokens a second, prefill included, and their ratio.
set -euo pipefail
cd "$(dirname "$0")/.."
rounds=${ROUNDS:-3} port=${PORT:-8093} peer=$1 seed=0
shift
cargo build --release --quiet
out=$(mktemp -d)
trap 'kill "${server:-0}" 2>/dev/null || true; rm -rf "$out"' EXIT
load() { # FILE STREAMS
    seed=$((seed + 1))
    target/release/conclave bench serve --url "http://127.0.0.1:$port" --requests $((4 * $2)) --concurrency "$2" --input-len 100 \
        --output-len 64 --warmup 2 --seed $seed --json "$out/report" >/dev/null
    python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))["output_tokens_per_s"])' "$out/report" >>"$out/$1.$2"
}
serve() { # NAME HEALTH COMMAND...
    local name=$1 health=$2
    shift 2
    "$@" >"$out/log" 2>&1 &
    server=$!
    until curl -sf "127.0.0.1:$port/$health" >/dev/null; do
        kill -0 "$server" 2>/dev/null || { cat "$out/log" >&2; exit 1; }
        sleep 0.1
    done
    for streams in 8 16; do load "$name" $streams; done
    kill -INT "$server"
    wait "$server" || true
}
for _ in $(seq "$rounds"); do
    for path in "$@"; do
        name=$(basename "$path" .gguf)
        serve "$name.here" readyz target/release/conclave serve "$path" --workers 1 --threads 2 --dtype bf16 --max-model-len 1024 \
            --listen "127.0.0.1:$port"
        serve "$name.peer" health "$peer" -m "$path" -t 2 -tb 2 -np 16 -c 8192 -cb --host 127.0.0.1 --port "$port"
    done
done
echo "| model | streams | here, llama.cpp | |"
echo "|---|---|---|---|"
for path in "$@"; do
    for streams in 8 16; do
        python3 - "$out/$(basename "$path" .gguf)" $streams <<'PY'
import statistics, sys
here, peer = (statistics.median(map(float, open(f"{sys.argv[1]}.{side}.{sys.argv[2]}"))) for side in ("here", "peer"))
print(f"| {sys.argv[1].split('/')[-1]} | {sys.argv[2]} | {here:.0f}, {peer:.0f} | {here / peer:.2f} |")
PY
    done
done
