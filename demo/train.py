#!/usr/bin/env python3
"""Train the small mixture-of-experts demo model, from nothing, on a CPU.

The script does four things, in order, and each is deterministic for a given
``--seed`` and a given number of ``--steps``:

1. writes a corpus with the grammar in ``corpus.py`` (own text, no outside
   data, so the model carries no third-party licence);
2. trains a byte-level BPE tokenizer on that corpus;
3. trains a Qwen3-MoE shaped model (bf16 compute, fp32 master weights, a
   load-balancing loss on the router);
4. exports a Hugging Face folder: ``config.json``, ``model.safetensors`` (bf16),
   ``tokenizer.json``, ``tokenizer_config.json`` (with the chat template) and
   ``generation_config.json``.

Needs: torch, tokenizers, safetensors, numpy. ``transformers`` is used only by
``--check`` and ``--sample``, which load the exported folder and generate.

    python train.py --out stage1 --docs 100000 --steps 2600
    python train.py --out model --init stage1 --mix answers --seed 8 \\
        --docs 120000 --lr 0.0015 --steps 900
    python train.py --out model --check --sample
    python train.py --out model --evaluate

With ``--minutes`` the learning-rate schedule follows the clock, so the result
depends on the machine's speed; the number of steps taken is printed, and
``--steps N`` repeats a run by step count instead.

Licence: the script, the grammar and the text and weights they produce are
work of this project, under the project's own licence; a few jokes, riddles and
proverbs in the grammar are traditional.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from corpus import CorpusBuilder, ModelCard

# --------------------------------------------------------------------------
# Shape
# --------------------------------------------------------------------------

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
END_OF_TEXT, IM_START, IM_END = 0, 1, 2

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class Shape:
    """Model dimensions, under their Hugging Face names."""

    vocab_size = 3072
    hidden_size = 192
    num_hidden_layers = 4
    num_attention_heads = 8
    num_key_value_heads = 4
    head_dim = 32
    num_experts = 8
    num_experts_per_tok = 2
    moe_intermediate_size = 128
    max_position_embeddings = 1024
    rope_theta = 10000.0
    rms_norm_eps = 1e-6
    router_aux_loss_coef = 0.01


# --------------------------------------------------------------------------
# Model (parameter names match transformers' Qwen3MoeForCausalLM checkpoints)
# --------------------------------------------------------------------------


class RmsNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


class Linear(nn.Linear):
    """A bias-free linear layer that computes in the dtype of its input."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


def rotate(x, cos, sin):
    """Rotary embedding, half-split layout. x: [batch, heads, time, head_dim]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, s: Shape):
        super().__init__()
        self.s = s
        self.q_proj = Linear(s.hidden_size, s.num_attention_heads * s.head_dim)
        self.k_proj = Linear(s.hidden_size, s.num_key_value_heads * s.head_dim)
        self.v_proj = Linear(s.hidden_size, s.num_key_value_heads * s.head_dim)
        self.o_proj = Linear(s.num_attention_heads * s.head_dim, s.hidden_size)
        block = torch.full((384, 384), float("-inf")).triu(1).bfloat16()
        self.register_buffer("future", block, persistent=False)
        self.q_norm = RmsNorm(s.head_dim, s.rms_norm_eps)
        self.k_norm = RmsNorm(s.head_dim, s.rms_norm_eps)

    def forward(self, x, cos, sin):
        b, t, _ = x.shape
        d = self.s.head_dim
        q = self.q_norm(self.q_proj(x).view(b, t, -1, d)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(b, t, -1, d)).transpose(1, 2)
        v = self.v_proj(x).view(b, t, -1, d).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        group = self.s.num_attention_heads // self.s.num_key_value_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        if t <= 384:  # plain matrix products beat the fused kernel on short rows
            score = torch.matmul(q * d**-0.5, k.transpose(2, 3)) + self.future[:t, :t]
            y = torch.matmul(score.softmax(-1), v)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).reshape(b, t, -1))


class MoeBlock(nn.Module):
    """Top-k routed experts. Expert weights are kept stacked for training and
    are written out one expert at a time, the way published checkpoints are."""

    def __init__(self, s: Shape):
        super().__init__()
        self.s = s
        e, h, m = s.num_experts, s.hidden_size, s.moe_intermediate_size
        self.gate = Linear(h, e)
        self.gate_up = nn.Parameter(torch.empty(e, 2 * m, h))
        self.down = nn.Parameter(torch.empty(e, h, m))

    def forward(self, x):
        s = self.s
        shape = x.shape
        x = x.reshape(-1, shape[-1])
        n = x.shape[0]
        probs = F.linear(x.float(), self.gate.weight).softmax(-1)
        weight, chosen = probs.topk(s.num_experts_per_tok, dim=-1)
        weight = weight / weight.sum(-1, keepdim=True)

        # Lay the (token, expert) pairs out by expert, each expert padded to the same
        # number of rows: a few fixed shapes are far faster here than exact ones.
        k, e = s.num_experts_per_tok, s.num_experts
        flat = chosen.reshape(-1)
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=e)
        room = -(-int(counts.max()) // 256) * 256
        owner = flat[order]
        slot = owner * room + torch.arange(n * k) - (counts.cumsum(0) - counts)[owner]
        source = torch.zeros(e * room, dtype=torch.long)
        source[slot] = order // k
        back = torch.empty_like(order)
        back[order] = slot
        z = x.index_select(0, source).view(e, room, -1)
        g, u = torch.bmm(z, self.gate_up.to(x.dtype).transpose(1, 2)).chunk(2, dim=-1)
        z = torch.bmm(F.silu(g) * u, self.down.to(x.dtype).transpose(1, 2))
        y = z.view(e * room, -1).index_select(0, back).view(n, k, -1)
        y = (y * weight.to(x.dtype).unsqueeze(-1)).sum(1)

        share = counts.float() / (n * s.num_experts_per_tok)
        balance = s.num_experts * (share * probs.mean(0)).sum()
        return y.view(shape), balance, counts


class TiedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of ``x @ w.T`` in cache-sized row blocks; the gradient
    is formed in the forward pass, so no full logits matrix is ever stored."""

    @staticmethod
    def forward(ctx, x, w, target):
        n = x.shape[0]
        total, gx, gw = 0.0, torch.empty_like(x), torch.zeros(w.shape)
        for lo in range(0, n, 512):
            xb, tb = x[lo : lo + 512], target[lo : lo + 512, None]
            m = len(xb)
            if m < 512:
                xb, tb = F.pad(xb, (0, 0, 0, 512 - m)), F.pad(tb, (0, 0, 0, 512 - m))
            p = F.linear(xb, w).float().log_softmax(-1)
            total -= float(p[:m].gather(1, tb[:m]).sum())
            p.exp_().scatter_add_(1, tb, torch.full(tb.shape, -1.0)).mul_(1.0 / n)
            g = p.bfloat16()
            g[m:] = 0
            gx[lo : lo + 512] = (g @ w)[:m]
            gw += g.t() @ xb
        ctx.save_for_backward(gx, gw.to(w.dtype))
        return torch.tensor(total / n)

    @staticmethod
    def backward(ctx, grad):
        gx, gw = ctx.saved_tensors
        return gx * grad, gw * grad, None


class Layer(nn.Module):
    def __init__(self, s: Shape):
        super().__init__()
        self.input_layernorm = RmsNorm(s.hidden_size, s.rms_norm_eps)
        self.self_attn = Attention(s)
        self.post_attention_layernorm = RmsNorm(s.hidden_size, s.rms_norm_eps)
        self.mlp = MoeBlock(s)

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        y, balance, counts = self.mlp(self.post_attention_layernorm(x))
        return x + y, balance, counts


class DemoModel(nn.Module):
    def __init__(self, s: Shape):
        super().__init__()
        self.s = s
        self.embed_tokens = nn.Embedding(s.vocab_size, s.hidden_size)
        self.layers = nn.ModuleList(Layer(s) for _ in range(s.num_hidden_layers))
        self.norm = RmsNorm(s.hidden_size, s.rms_norm_eps)
        inv = s.rope_theta ** (-torch.arange(0, s.head_dim, 2).float() / s.head_dim)
        angle = torch.arange(s.max_position_embeddings).float()[:, None] * inv
        self.register_buffer("cos", angle.cos().bfloat16(), persistent=False)
        self.register_buffer("sin", angle.sin().bfloat16(), persistent=False)
        residual = (2 * s.num_hidden_layers) ** -0.5
        for name, p in self.named_parameters():
            if p.dim() > 1:
                scaled = name.endswith(("o_proj.weight", "down"))
                nn.init.normal_(p, std=0.04 * (residual if scaled else 1.0))

    def hidden(self, ids):
        t = ids.shape[1]
        x = F.embedding(ids, self.embed_tokens.weight.bfloat16())
        balance, counts = 0.0, []
        for layer in self.layers:
            x, b, c = layer(x, self.cos[:t], self.sin[:t])
            balance = balance + b
            counts.append(c)
        return self.norm(x), balance / self.s.num_hidden_layers, counts

    def loss(self, ids, mask):
        """Mean cross-entropy over the positions whose *target* has mask > 0."""
        x, balance, counts = self.hidden(ids[:, :-1])
        keep = mask[:, 1:].reshape(-1) > 0
        x = x.reshape(-1, x.shape[-1])[keep]
        ce = TiedCrossEntropy.apply(
            x, self.embed_tokens.weight.bfloat16(), ids[:, 1:].reshape(-1)[keep])
        return ce, balance, counts


# --------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------


def train_tokenizer(texts, vocab_size: int):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tok.train_from_iterator(texts, trainer)
    return tok


def encode(tok, docs):
    """Token ids and loss masks. A document is a list of (role, text) turns, or
    ``[(None, text)]`` for plain prose. Loss falls on the assistant's turns and
    on plain prose."""
    pieces, shape = [], []
    for doc in docs:
        shape.append(len(doc))
        for role, text in doc:
            pieces.append(text if role is None else text)
    flat = tok.encode_batch(pieces, add_special_tokens=False)
    role_ids = {r: tok.encode(r + "\n").ids for r in ("system", "user", "assistant")}
    newline = tok.encode("\n").ids
    out, at = [], 0
    for doc, n in zip(docs, shape):
        ids, mask = [], []
        for (role, _), enc in zip(doc, flat[at : at + n]):
            if role is None:
                ids += enc.ids + [END_OF_TEXT]
                mask += [0] + [1] * len(enc.ids)
            else:
                head = [IM_START] + role_ids[role]
                on = 1 if role == "assistant" else 0
                ids += head + enc.ids + [IM_END] + newline
                mask += [0] * len(head) + [on] * (len(enc.ids) + 1) + [0] * len(newline)
        at += n
        out.append((np.array(ids, dtype=np.int16), np.array(mask, dtype=np.int8)))
    return out


def batches(data, tokens_per_batch: int, limit: int, seed: int):
    """Endless batches of documents of similar length, right-padded. No document
    sees another, so a document always starts at position 0, as in use."""
    rng = random.Random(seed)
    data = [d for d in data if len(d[0]) <= limit]
    while True:
        rng.shuffle(data)
        plan = []
        for lo in range(0, len(data), 4096):
            pool = sorted(data[lo : lo + 4096], key=lambda d: len(d[0]))
            while pool:
                # Longest first; widths in steps of 32, so that few shapes occur.
                width = -(-len(pool[-1][0]) // 32) * 32
                count = max(1, tokens_per_batch // width)
                plan.append((width, pool[-count:]))
                pool = pool[:-count]
        rng.shuffle(plan)
        for width, group in plan:
            ids = np.zeros((len(group), width + 1), dtype=np.int64)
            mask = np.zeros((len(group), width + 1), dtype=np.int64)
            for i, (a, m) in enumerate(group):
                ids[i, : len(a)] = a
                mask[i, : len(m)] = m
            yield torch.from_numpy(ids), torch.from_numpy(mask)


# --------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------


def train(args, shape, train_data, held_out):
    torch.manual_seed(args.seed)
    model = DemoModel(shape)
    if args.init:
        load_weights(model, shape, args.init)
    total = sum(p.numel() for p in model.parameters())
    print(f"parameters: {total}", flush=True)
    decay = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    opt = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}],
        lr=args.lr, betas=(0.9, 0.98), eps=1e-8, fused=True,
    )
    feed = batches(train_data, args.batch_tokens, shape.max_position_embeddings, args.seed)
    start, seen, step, log = time.time(), 0, 0, []
    window = []
    while True:
        done = step / args.steps if args.steps else (time.time() - start) / (60 * args.minutes)
        if done >= 1:
            break
        warm = min(1.0, (step + 1) / 100)
        rate = args.lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        for g in opt.param_groups:
            g["lr"] = rate
        ids, mask = next(feed)
        ce, balance, counts = model.loss(ids, mask)
        (ce + shape.router_aux_loss_coef * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad(set_to_none=True)
        seen += ids.numel()
        step += 1
        window.append(ce.item())
        if step % 50 == 0:
            dt = time.time() - start
            load = [f"{int(c.max()) / max(1, int(c.sum())) * shape.num_experts:.2f}" for c in counts]
            print(
                f"step {step} loss {np.mean(window):.4f} balance {balance.item():.3f} "
                f"busiest/mean {'/'.join(load)} lr {rate:.2e} tokens {seen} "
                f"tok/s {seen / dt:.0f} t {dt:.0f}s", flush=True,
            )
            log.append((step, float(np.mean(window))))
            window = []
            if step % 500 == 0 and args.checkpoint:
                torch.save(model.state_dict(), args.checkpoint)
    model.eval()
    with torch.no_grad():
        tot, n = 0.0, 0
        feed = batches(held_out, args.batch_tokens, shape.max_position_embeddings, 0)
        load = torch.zeros(shape.num_hidden_layers, shape.num_experts)
        for _ in range(10):
            ids, mask = next(feed)
            ce, _, counts = model.loss(ids, mask)
            k = int((mask[:, 1:] > 0).sum())
            tot, n = tot + float(ce) * k, n + k
            load += torch.stack(counts).float()
    load = load / load.sum(1, keepdim=True)
    print(f"held-out loss {tot / n:.4f} (perplexity {math.exp(tot / n):.3f})")
    for i, row in enumerate(load.tolist()):
        print(f"layer {i} expert share", " ".join(f"{v:.3f}" for v in row))
    print(f"steps {step}, tokens {seen}, wall {time.time() - start:.0f} s", flush=True)
    return model


# --------------------------------------------------------------------------
# Export
# --------------------------------------------------------------------------


def export(model, tok, shape, out: str):
    from safetensors.torch import save_file

    os.makedirs(out, exist_ok=True)
    tensors = {}
    for name, p in model.state_dict().items():
        p = p.detach().bfloat16().contiguous()
        name = "model." + name
        if name.endswith(".mlp.gate_up"):
            stem = name[: -len("gate_up")]
            for e in range(shape.num_experts):
                g, u = p[e].chunk(2, dim=0)
                tensors[f"{stem}experts.{e}.gate_proj.weight"] = g.contiguous()
                tensors[f"{stem}experts.{e}.up_proj.weight"] = u.contiguous()
        elif name.endswith(".mlp.down"):
            stem = name[: -len("down")]
            for e in range(shape.num_experts):
                tensors[f"{stem}experts.{e}.down_proj.weight"] = p[e].contiguous()
        else:
            tensors[name] = p
    save_file(tensors, os.path.join(out, "model.safetensors"), metadata={"format": "pt"})
    tok.save(os.path.join(out, "tokenizer.json"), pretty=False)

    def write(name, value):
        with open(os.path.join(out, name), "w") as f:
            json.dump(value, f, indent=2)
            f.write("\n")

    write("config.json", {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.moe_intermediate_size * shape.num_experts_per_tok,
        "moe_intermediate_size": shape.moe_intermediate_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.head_dim,
        "num_experts": shape.num_experts,
        "num_experts_per_tok": shape.num_experts_per_tok,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "router_aux_loss_coef": shape.router_aux_loss_coef,
        "output_router_logits": False,
        "hidden_act": "silu",
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_theta": shape.rope_theta,
        "rope_scaling": None,
        "max_position_embeddings": shape.max_position_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "sliding_window": None,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "use_cache": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": END_OF_TEXT,
        "eos_token_id": IM_END,
        "pad_token_id": END_OF_TEXT,
    })
    write("generation_config.json", {
        "bos_token_id": END_OF_TEXT,
        "eos_token_id": [IM_END, END_OF_TEXT],
        "pad_token_id": END_OF_TEXT,
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.95,
    })
    write("tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": shape.max_position_embeddings,
        "add_bos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "added_tokens_decoder": {
            str(i): {"content": t, "lstrip": False, "rstrip": False, "normalized": False,
                     "single_word": False, "special": True}
            for i, t in enumerate(SPECIAL)
        },
        "chat_template": CHAT_TEMPLATE,
    })
    size = sum(os.path.getsize(os.path.join(out, f)) for f in os.listdir(out))
    print(f"exported {len(tensors)} tensors, {size} bytes in all")


def load_weights(model, shape, folder: str):
    """The inverse of ``export``: read a folder's weights into a training model."""
    from safetensors.torch import load_file

    t = load_file(os.path.join(folder, "model.safetensors"))
    with torch.no_grad():
        for name, p in model.named_parameters():
            name = "model." + name
            if name.endswith((".mlp.gate_up", ".mlp.down")):
                stem, _, part = name.rpartition(".")
                take = ["gate_proj", "up_proj"] if part == "gate_up" else ["down_proj"]
                p.copy_(torch.stack([
                    torch.cat([t[f"{stem}.experts.{e}.{w}.weight"] for w in take])
                    for e in range(shape.num_experts)]))
            else:
                p.copy_(t[name])


SAMPLE_PROMPTS = [
    "Tell me a story about a fox.",
    "Write a short story about a hedgehog named Zuli who is afraid of the dark.",
    "Who are you?",
    "What is a mixture of experts?",
    "Write a poem about the rain.",
    "What does an owl eat?",
    "What is 7 plus 5?",
    "Who won the football match yesterday?",
    ["Tell me a story about a penguin.", "What was the penguin's name?", "What is the lesson?",
     "Now tell one about a whale."],
]


def sample(out: str, prompts, temperatures=(0.0, 0.7), seed=1):
    """Generate from the exported folder with transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tok = AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    for prompt in prompts:
        turns = [prompt] if isinstance(prompt, str) else prompt
        for temp in temperatures:
            torch.manual_seed(seed)
            messages = []
            for turn in turns:
                messages.append({"role": "user", "content": turn})
                text = tok.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
                ids = tok(text, return_tensors="pt", add_special_tokens=False)
                how = {"do_sample": False, "temperature": None, "top_p": None} if temp == 0 else {
                    "do_sample": True, "temperature": temp, "top_p": 1.0, "top_k": 0}
                with torch.no_grad():
                    y = model.generate(**ids, max_new_tokens=320, **how)
                reply = tok.decode(y[0, ids["input_ids"].shape[1]:], skip_special_tokens=True)
                messages.append({"role": "assistant", "content": reply})
            print(f"--- temperature {temp}")
            for m in messages:
                print(f"[{m['role']}] {m['content']}")
            print(flush=True)


def evaluate(out: str, build, count=48):
    """Greedy checks of what can be checked by rule: does a story keep the animal and
    the name it was asked for, are sums and animal facts right, do answers end?"""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from corpus import FACTS, NAMES_HE, NAMES_SHE

    tok = AutoTokenizer.from_pretrained(out, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    r = random.Random(99)

    def ask(prompts, new):
        replies, ended = [], 0
        for lo in range(0, len(prompts), 64):
            text = [tok.apply_chat_template([{"role": "user", "content": q}], tokenize=False,
                                            add_generation_prompt=True) for q in prompts[lo : lo + 64]]
            ids = tok(text, return_tensors="pt", padding=True, add_special_tokens=False)
            with torch.no_grad():
                y = model.generate(**ids, max_new_tokens=new, do_sample=False, temperature=None, top_p=None)
            y = y[:, ids["input_ids"].shape[1]:]
            ended += int((y == IM_END).any(1).sum())
            replies += tok.batch_decode(y, skip_special_tokens=True)
        return replies, ended

    def report(name, good, total, ended):
        print(f"{name}: {good}/{total} right, {ended}/{total} ended", flush=True)

    for label, kinds, named in (
        ("story, known animal, known name", build.kinds, lambda: r.choice(NAMES_HE + NAMES_SHE)),
        ("story, known animal, made-up name", build.kinds, lambda: build.invented(r)),
        ("story, made-up animal, made-up name", None, lambda: build.invented(r)),
    ):
        want = [(r.choice(kinds) if kinds else build.invented(r, upper=False), named()) for _ in range(count)]
        got, ended = ask([f"Tell me a story about {build.article(k)} named {n}." for k, n in want], 400)
        good = sum(f" {k} " in g[:200] and g.count(n) >= 3 for (k, n), g in zip(want, got))
        report(label, good, count, ended)
    sums = [(a, b) for a in range(13) for b in range(13)]
    got, ended = ask([f"What is {a} plus {b}?" for a, b in sums], 24)
    report("sums to 12 + 12", sum(g.endswith(f" {a + b}.") for (a, b), g in zip(sums, got)), len(sums), ended)
    for label, ask_for, at in (("what it eats", "What does {} eat?", 1), ("where it lives", "Where does {} live?", 0)):
        animals = sorted(FACTS)
        got, ended = ask([ask_for.format(build.article(a)) for a in animals], 40)
        report(label, sum(FACTS[a][at] in g for a, g in zip(animals, got)), len(animals), ended)


def check(out: str, model=None):
    """Load the folder with transformers; compare its logits with the training model's."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tok = AutoTokenizer.from_pretrained(out)
    ref, info = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, output_loading_info=True)
    print("missing", info["missing_keys"], "unexpected", info["unexpected_keys"])
    ids = tok("Once upon a time, there was a little fox.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        got = ref(ids).logits
        if model is not None:
            x, _, _ = model.hidden(ids)
            want = F.linear(x.float(), model.embed_tokens.weight)
            print("largest logit difference", float((got - want).abs().max()),
                  "same argmax", bool((got.argmax(-1) == want.argmax(-1)).all()))


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--out", default="model", help="folder for the exported model")
    p.add_argument("--docs", type=int, default=200_000, help="documents to write")
    p.add_argument("--held-out", type=int, default=1000, help="documents kept for evaluation")
    p.add_argument("--minutes", type=float, default=30, help="training time; ignored with --steps")
    p.add_argument("--steps", type=int, default=0, help="training steps, for a repeatable run")
    p.add_argument("--batch-tokens", type=int, default=8192)
    p.add_argument("--init", default="", help="start from an exported folder and keep its tokenizer")
    p.add_argument("--mix", choices=["stories", "answers"], default="stories",
                   help="what the corpus is mostly made of")
    p.add_argument("--lr", type=float, default=3e-3)
    p.add_argument("--seed", type=int, default=7)
    p.add_argument("--threads", type=int, default=0)
    p.add_argument("--checkpoint", default="", help="file for checkpoints every 500 steps")
    p.add_argument("--dump-corpus", type=int, default=0, help="print N documents and stop")
    p.add_argument("--check", action="store_true", help="only load --out with transformers")
    p.add_argument("--sample", action="store_true", help="only generate samples from --out")
    p.add_argument("--evaluate", action="store_true", help="only run the rule-based checks on --out")
    args = p.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)

    if args.check or args.sample:
        if args.check:
            check(args.out)
        if args.sample:
            sample(args.out, SAMPLE_PROMPTS)
        return

    shape = Shape()
    card = ModelCard(layers=shape.num_hidden_layers, experts=shape.num_experts,
                     top_k=shape.num_experts_per_tok, hidden=shape.hidden_size,
                     vocab=shape.vocab_size, context=shape.max_position_embeddings,
                     million_parameters="three and a half")
    build = CorpusBuilder(args.seed, card, args.mix)
    if args.evaluate:
        evaluate(args.out, build)
        return
    if args.dump_corpus:
        for i in range(args.dump_corpus):
            for role, text in build.document(i):
                print(f"[{role}] {text}" if role else text)
            print("-----")
        return

    t = time.time()
    docs = [build.document(i) for i in range(args.docs + args.held_out)]
    print(f"wrote {len(docs)} documents in {time.time() - t:.0f} s", flush=True)
    t = time.time()
    if args.init:
        from tokenizers import Tokenizer

        tok = Tokenizer.from_file(os.path.join(args.init, "tokenizer.json"))
    else:
        tok = train_tokenizer((text for d in docs[:20_000] for _, text in d), shape.vocab_size)
    data = encode(tok, docs)
    del docs
    n = sum(len(d[0]) for d in data)
    print(f"tokenizer {tok.get_vocab_size()} entries, {n} tokens, {time.time() - t:.0f} s", flush=True)
    held, data = data[: args.held_out], data[args.held_out :]
    model = train(args, shape, data, held)
    export(model, tok, shape, args.out)
    check(args.out, model)


if __name__ == "__main__":
    main()
