#!/usr/bin/env bash
# Prefill and decode of one model in several weight formats: benches/formats.sh MODEL... (see random_moe.py), rounds in turn so that
# a busy moment hurts all alike. Prints a line a model: median of ROUNDS, tokens a second.
set -euo pipefail
cd "$(dirname "$0")/.."
rounds=${ROUNDS:-3} port=${PORT:-8093}
cargo build --release --quiet
out=$(mktemp -d)
trap 'kill "${server:-0}" 2>/dev/null || true; rm -rf "$out"' EXIT
for _ in $(seq "$rounds"); do
    for path in "$@"; do
        target/release/conclave serve "$path" --workers 1 --dtype bf16 --max-model-len 1024 --listen "127.0.0.1:$port" \
            >"$out/log" 2>&1 &
        server=$!
        until curl -sf "127.0.0.1:$port/readyz" >/dev/null; do
            kill -0 "$server" 2>/dev/null || { cat "$out/log" >&2; exit 1; }
            sleep 0.1
        done
        name=$(basename "$path")
        target/release/conclave bench serve --url "http://127.0.0.1:$port" --requests 3 --concurrency 1 --input-len 512 \
            --output-len 64 --json "$out/report" >/dev/null
        cat "$out/report" >>"$out/$name.json"
        kill -INT "$server"
        wait "$server" || true
    done
done
echo "| format | prefill of 512, tok/s | decode, tok/s |"
echo "|---|---|---|"
for path in "$@"; do
    name=$(basename "$path")
    python3 - "$name" "$out/$name.json" <<'PY'
import json, statistics, sys
rounds, decoder, text, at = [], json.JSONDecoder(), open(sys.argv[2]).read().strip(), 0
while at < len(text):
    value, at = decoder.raw_decode(text, at)
    rounds.append(value)
    at += len(text[at:]) - len(text[at:].lstrip())
middle = lambda pick: statistics.median(pick(r) for r in rounds)
prefill, decode = middle(lambda r: 512e3 / r["ttft"]["p50_ms"]), middle(lambda r: 1e3 / r["itl"]["p50_ms"])
print(f"| {sys.argv[1].removesuffix('.gguf')} | {prefill:.0f} | {decode:.1f} |")
PY
done
