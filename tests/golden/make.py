#!/usr/bin/env python3
"""Writes the goldens of a checkpoint: what the reference implementation computes from its files, in float32 on a CPU.

    make.py FOLDER                goldens of the checkpoint in FOLDER
    make.py FOLDER --init SEED    first fills FOLDER, which has a config.json, with random weights in bfloat16

Needs torch, transformers and safetensors; a tokenizer in FOLDER is used where there is one. A seed whose greedy
continuation hangs on a near tie, or changes when every weight moves by a millionth, is refused: try another.
"""

import argparse
import json
import pathlib
import random
import sys

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

GREEDY_TOKENS = 32
KEPT_ROWS = 16  # prompt positions whose logits are kept whole
CANDIDATES = 5
PROMPT_LENGTHS = (56, 92)
LEAST_MARGIN = 5e-3  # between the best two candidates of a step
LEAST_DIFFERENT = 8  # tokens of a continuation


def load(folder):
    """The model as its files say, widened to float32, with the plainest attention and experts."""
    plain = {"attn_implementation": "eager", "dtype": torch.float32}
    return AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager", **plain).eval()


def fill(folder, seed):
    """Random weights wide enough that logits differ and routers have preferences."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.1)
            else:
                weight.normal_(0.0, 1.5 / weight.shape[-1] ** 0.5)
    model.to(torch.bfloat16).save_pretrained(folder)


class Routes:
    """Notes which experts each layer is called with, and their weights."""

    def __init__(self, model):
        self.seen = {}
        named = [(name, module) for name, module in model.named_modules() if type(module).__name__.endswith("Experts")]
        self.hooks = [
            module.register_forward_pre_hook(lambda _, a, k, name=name: self.note(name, a, k), with_kwargs=True)
            for name, module in named
        ]

    def note(self, name, positional, named):
        chosen = list(positional[1:]) + [named[key] for key in ("top_k_index", "top_k_weights") if key in named]
        ids, order = chosen[0].sort(dim=-1)
        self.seen[name] = (ids.to(torch.int32), chosen[1].float().gather(1, order).contiguous())

    def close(self):
        for hook in self.hooks:
            hook.remove()


@torch.no_grad()
def answer(model, ids):
    """Prompt logits, hidden rows, routes, and the greedy continuation with its logits."""
    routes = Routes(model)
    out = model(torch.tensor([ids]), output_hidden_states=True, use_cache=False)
    routes.close()
    tokens, rows, cache, step = [], [], None, torch.tensor([ids])
    for _ in range(GREEDY_TOKENS):
        next = model(step, past_key_values=cache, use_cache=True)
        cache, row = next.past_key_values, next.logits[0, -1].float()
        rows.append(row)
        tokens.append(int(row.argmax()))
        step = torch.tensor([tokens[-1:]])
    return out.logits[0].float(), [h[0, -1].float().flatten() for h in out.hidden_states], routes.seen, tokens, torch.stack(rows)


def golden(model, name, ids, tensors):
    logits, hidden, routes, tokens, rows = answer(model, ids)
    best = rows.topk(CANDIDATES)
    margin = float((best.values[:, 0] - best.values[:, 1]).min())
    if margin < LEAST_MARGIN or len(set(tokens)) < LEAST_DIFFERENT:
        sys.exit(f"{name}: {len(set(tokens))} different tokens, least margin {margin:.1e}; try another seed")
    tensors[f"{name}.prefill_logits"] = logits[-KEPT_ROWS:].contiguous()
    tensors.update({f"{name}.hidden.{i}": row.contiguous() for i, row in enumerate(hidden)})
    for module, (chosen, weights) in routes.items():
        tensors[f"{name}.experts.{module}.ids"], tensors[f"{name}.experts.{module}.weights"] = chosen, weights
    rounded = lambda values: [round(value, 5) for value in values.tolist()]
    told = {
        "name": name,
        "input_ids": ids,
        "prefill_logits_positions": [len(ids) - KEPT_ROWS, len(ids)],
        "prefill_argmax": logits.argmax(-1).tolist(),
        "prefill_logsumexp": rounded(logits.logsumexp(-1)),
        "greedy_ids": tokens,
        "greedy_top5": [{"ids": i.tolist(), "logits": rounded(v)} for i, v in zip(best.indices, best.values)],
        "greedy_logsumexp": rounded(rows.logsumexp(-1)),
        "moe_layers": list(routes),
    }
    return told, logits, routes


@torch.no_grad()
def shaken(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        weight.mul_(1 + 1e-6 * torch.randn(weight.shape, generator=generator))
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--init", type=int, metavar="SEED")
    options = parser.parse_args()
    if options.init is not None:
        fill(options.folder, options.init)
    model = load(options.folder)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    draw = random.Random(7)
    prompts = [[draw.randrange(3, min(vocabulary, 500)) for _ in range(length)] for length in PROMPT_LENGTHS]
    tensors = {}
    first = [golden(model, f"p{i}", ids, tensors) for i, ids in enumerate(prompts)]
    shaken(model, 1)
    for i, (told, logits, routes) in enumerate(first):
        moved, _, routed, tokens, _ = answer(model, told["input_ids"])
        same = all(torch.equal(routes[module][0], routed[module][0]) for module in routes)
        if tokens != told["greedy_ids"] or not same:
            sys.exit(f"p{i}: a change of a millionth changes the answer; try another seed")
        told["suggested_atol"] = max(1e-3, 10 * float((moved - logits).abs().max()))
    written = {"prompts": [told for told, _, _ in first]}
    if (options.folder / "tokenizer.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(options.folder)
        texts = ["Hello, world!", "  two  spaces\n\nand lines\t", "naïve café, 世界 🙂", "x = 1234567.89;"]
        written["tokenizer_cases"] = [
            {
                "text": text,
                "ids": tokenizer(text).input_ids,
                "ids_no_special": tokenizer(text, add_special_tokens=False).input_ids,
                "decoded": tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids),
            }
            for text in texts
        ]
    (options.folder / "golden.json").write_text(json.dumps(written))
    save_file(tensors, options.folder / "golden.safetensors")


if __name__ == "__main__":
    main()
