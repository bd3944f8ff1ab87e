#!/usr/bin/env bash
# One stream of GGUF files here and in llama.cpp, in turn: benches/beside.sh LLAMA_BENCH MODEL.gguf... Two threads each; prefill of 512
# tokens, then 64 tokens after a prompt of 4. Prints a line a model: medians of ROUNDS in tokens a second, and their ratio.
set -euo pipefail
cd "$(dirname "$0")/.."
rounds=${ROUNDS:-3} port=${PORT:-8093} peer=$1
shift
cargo build --release --quiet
out=$(mktemp -d)
trap 'kill "${server:-0}" 2>/dev/null || true; rm -rf "$out"' EXIT
load() {
    target/release/conclave bench serve --url "http://127.0.0.1:$port" --requests 4 --concurrency 1 --input-len "$1" \
        --output-len "$2" --json "$out/report" >/dev/null
}
for _ in $(seq "$rounds"); do
    for path in "$@"; do
        name=$(basename "$path" .gguf)
        "$peer" -m "$path" -t 2 -p 512 -n 64 -r 2 -o json 2>/dev/null >"$out/peer"
        target/release/conclave serve "$path" --workers 1 --threads 2 --dtype bf16 --max-model-len 1024 \
            --listen "127.0.0.1:$port" >"$out/log" 2>&1 &
        server=$!
        until curl -sf "127.0.0.1:$port/readyz" >/dev/null; do
            kill -0 "$server" 2>/dev/null || { cat "$out/log" >&2; exit 1; }
            sleep 0.1
        done
        load 512 1 && mv "$out/report" "$out/prefill"
        load 4 64 && mv "$out/report" "$out/decode"
        kill -INT "$server"
        wait "$server" || true
        python3 - "$out" >>"$out/$name.txt" <<'PY'
import json, sys
read = lambda name: json.load(open(f"{sys.argv[1]}/{name}"))
peer = {bool(row["n_prompt"]): row["avg_ts"] for row in read("peer")}
print(512e3 / read("prefill")["ttft"]["p50_ms"], peer[True], 1e3 / read("decode")["itl"]["p50_ms"], peer[False])
PY
    done
done
echo "| model | prefill of 512: here, llama.cpp | | decode: here, llama.cpp | |"
echo "|---|---|---|---|---|"
for path in "$@"; do
    python3 - "$(basename "$path" .gguf)" "$out" <<'PY'
import statistics, sys
rows = [list(map(float, line.split())) for line in open(f"{sys.argv[2]}/{sys.argv[1]}.txt")]
a, b, c, d = (statistics.median(column) for column in zip(*rows))
print(f"| {sys.argv[1]} | {a:.0f}, {b:.0f} | {a / b:.2f} | {c:.1f}, {d:.1f} | {c / d:.2f} |")
PY
done
