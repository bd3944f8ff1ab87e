"""What transformers says: greedy tokens, their log-probabilities and the best candidates, in f32 on the CPU, eager."""

import pathlib

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from upcycle import source

TOKENS = 64
# One more than the server is asked for, so that the margin to the next is known too.
BEST = 6

LONG = " ".join(f"Item {n}: the {c} box weighs {n * 7 % 41} kilograms and goes to shelf {n * 13 % 29}."
                for n, c in enumerate(["red", "green", "blue", "white", "black"] * 6))
TEXTS = {
    "story": "Once upon a time, in a small village by the sea,",
    "fact": "The three largest planets of the solar system are",
    "code": "def fibonacci(n):\n    \"\"\"Return the n-th Fibonacci number.\"\"\"\n",
    "french": "La Révolution française a commencé en",
    "sums": "1 + 1 = 2\n2 + 2 = 4\n3 + 3 = 6\n4 + 4 =",
    "marks": "naïve café — “quotes”, 中文, русский, 😀🎉:",
    "list": "Ingredients for a simple pancake recipe:\n-",
    "long": LONG + "\nThe heaviest box",
}
CHATS = {
    "chat": [{"role": "user", "content": "Explain in two sentences why the sky is blue."}],
    "turns": [{"role": "system", "content": "You answer briefly."},
              {"role": "user", "content": "Name a fruit."},
              {"role": "assistant", "content": "Apple."},
              {"role": "user", "content": "Another one, please."}],
}


def load(model):
    path, extra = source(model)
    loaded = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager", **extra)
    assert all(p.dtype == torch.float32 for p in loaded.parameters()), "the reference must compute in f32"
    return loaded.eval(), AutoTokenizer.from_pretrained(path, **extra)


def prompts(tokenizer):
    """Name to token ids: texts, chats, a lone token, and ids that nobody would write."""
    ids = {name: tokenizer(text).input_ids for name, text in TEXTS.items()}
    for name, messages in CHATS.items():
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids[name] = tokenizer(text, add_special_tokens=False).input_ids
    ids["lone"] = ids["fact"][:1]
    ids["noise"] = [1009 + 7919 * n % 40000 for n in range(40)]
    return ids


@torch.no_grad()
def greedy(model, ids):
    """`TOKENS` greedy tokens after `ids`; for each, its best `BEST` candidates and their log-probabilities."""
    out = model(torch.tensor([ids]), use_cache=True)
    steps = []
    for _ in range(TOKENS):
        scores = torch.log_softmax(out.logits[0, -1].double(), -1)
        best = scores.topk(BEST)
        steps.append({"ids": best.indices.tolist(), "logprobs": best.values.tolist()})
        out = model(best.indices[:1].view(1, 1), past_key_values=out.past_key_values, use_cache=True)
    return steps


def compute(path):
    """Everything that the check compares with, as JSON."""
    torch.manual_seed(0)
    model, tokenizer = load(path)
    cases = []
    for name, ids in prompts(tokenizer).items():
        steps = greedy(model, ids)
        texts = [tokenizer.decode([i]) for step in steps for i in step["ids"][:1]]
        cases.append({"name": name, "prompt": ids, "text": TEXTS.get(name), "chat": CHATS.get(name), "steps": steps,
                      "said": "".join(texts)})
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"model": pathlib.Path(path).name, "versions": versions, "cases": cases}
