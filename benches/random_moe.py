#!/usr/bin/env python3
"""Writes a random mixture of experts in a weight format, to time it: Qwen3-MoE, 24 layers of 32 experts of which 4 are active,
1.37 G parameters in all, 0.27 G read for a token (the embedding table apart).

    random_moe.py FORMAT OUT

FORMAT: bf16, fp8 (128 x 128 blocks) or int4 (compressed-tensors, groups of 32) write a folder of safetensors; Q8_0, Q4_0, Q4_K,
Q6_K, IQ4_XS and MXFP4 write a GGUF file. Codes are random bytes: what the numbers are does not matter to the clock. Needs numpy,
and for GGUF the `gguf` package. The tokenizer is the demo model's.
"""

import json
import pathlib
import struct
import sys

import numpy as np

LAYERS, HIDDEN, EXPERTS, ACTIVE, CHANNELS, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 24, 1024, 32, 4, 512, 16, 4, 64, 49152
DEMO = pathlib.Path(__file__).resolve().parent.parent / "demo" / "model"
# Bytes of a block, weights in it, where its half-precision scales are.
BLOCKS = {
    "Q8_0": (34, 32, [0]),
    "Q4_0": (18, 32, [0]),
    "Q4_K": (144, 256, [0, 2]),
    "Q6_K": (210, 256, [208]),
    "IQ4_XS": (136, 256, [0]),
    "MXFP4": (17, 32, []),
}
draw = np.random.default_rng(7)


def bf16(values):
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def plain(*shape, spread=0.02):
    return "BF16", bf16(draw.standard_normal(shape, dtype=np.float32) * spread), list(shape)


def ones(*shape):
    return "BF16", bf16(np.ones(shape, np.float32)), list(shape)


def layer_matrices():
    """Suffix, rows and inputs of a layer's matrices outside the experts."""
    yield "self_attn.q_proj", HEADS * HEAD_DIM, HIDDEN
    yield "self_attn.k_proj", KV_HEADS * HEAD_DIM, HIDDEN
    yield "self_attn.v_proj", KV_HEADS * HEAD_DIM, HIDDEN
    yield "self_attn.o_proj", HIDDEN, HEADS * HEAD_DIM


def expert_matrices():
    yield "gate_proj", CHANNELS, HIDDEN
    yield "up_proj", CHANNELS, HIDDEN
    yield "down_proj", HIDDEN, CHANNELS


def coded(form, name, rows, inputs, expert):
    """A matrix's tensors in a form; int4 leaves all but experts plain, as checkpoints published so do."""
    if form == "fp8":
        codes = draw.integers(0, 256, (rows, inputs), dtype=np.uint8)
        codes[(codes & 0x7F) == 0x7F] = 0x38  # no NaN
        scales = np.full((-(-rows // 128), -(-inputs // 128)), 2e-4, np.float32)
        yield name + ".weight", ("F8_E4M3", codes, [rows, inputs])
        yield name + ".weight_scale_inv", ("F32", scales, list(scales.shape))
    elif form == "int4" and expert:
        codes = draw.integers(0, 1 << 32, (rows, inputs // 8), dtype=np.uint32).view(np.int32)
        scales = bf16(np.full((rows, inputs // 32), 4e-3, np.float32))
        yield name + ".weight_packed", ("I32", codes, list(codes.shape))
        yield name + ".weight_scale", ("BF16", scales, list(scales.shape))
        yield name + ".weight_shape", ("I32", np.array([rows, inputs], np.int32), [2])
    else:
        yield name + ".weight", plain(rows, inputs)


def tensors(form):
    yield "model.embed_tokens.weight", plain(VOCABULARY, HIDDEN, spread=1.0)
    yield "lm_head.weight", plain(VOCABULARY, HIDDEN)
    yield "model.norm.weight", ones(HIDDEN)
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        for norm, width in [("input_layernorm", HIDDEN), ("post_attention_layernorm", HIDDEN), ("self_attn.q_norm", HEAD_DIM), ("self_attn.k_norm", HEAD_DIM)]:
            yield f"{at}{norm}.weight", ones(width)
        yield at + "mlp.gate.weight", plain(EXPERTS, HIDDEN, spread=0.05)
        for suffix, rows, inputs in layer_matrices():
            yield from coded(form, at + suffix, rows, inputs, False)
        for expert in range(EXPERTS):
            for suffix, rows, inputs in expert_matrices():
                yield from coded(form, f"{at}mlp.experts.{expert}.{suffix}", rows, inputs, True)


def config(form):
    told = json.loads((DEMO / "config.json").read_text())
    told |= {
        "num_hidden_layers": LAYERS, "hidden_size": HIDDEN, "num_experts": EXPERTS, "num_experts_per_tok": ACTIVE,
        "moe_intermediate_size": CHANNELS, "intermediate_size": 2048, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM, "vocab_size": VOCABULARY, "max_position_embeddings": 8192, "tie_word_embeddings": False,
    }
    if form == "fp8":
        told["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    if form == "int4":
        weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
        told["quantization_config"] = {
            "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head", "re:.*self_attn.*"],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        }
    return told


def write_folder(form, out):
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(config(form), indent=1))
    for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]:
        (out / name).write_bytes((DEMO / name).read_bytes())
    header, at, body = {}, 0, out / "body"
    with open(body, "wb") as file:
        for name, (kind, values, shape) in tensors(form):
            header[name] = {"dtype": kind, "shape": shape, "data_offsets": [at, at + values.nbytes]}
            file.write(values.tobytes())
            at += values.nbytes
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with open(out / "model.safetensors", "wb") as file, open(body, "rb") as rest:
        file.write(struct.pack("<Q", len(head)) + head)
        while chunk := rest.read(1 << 24):
            file.write(chunk)
    body.unlink()


def write_gguf(form, out):
    import gguf

    kind = gguf.GGMLQuantizationType[form]
    size, width, scales = BLOCKS[form]
    writer = gguf.GGUFWriter(out, "qwen3moe")
    writer.add_block_count(LAYERS)
    writer.add_context_length(8192)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(2048)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(ACTIVE)
    writer.add_expert_feed_forward_length(CHANNELS)
    vocabulary = json.loads((DEMO / "tokenizer.json").read_text())
    tokens = sorted(vocabulary["model"]["vocab"], key=vocabulary["model"]["vocab"].get)
    added = [entry["content"] for entry in vocabulary["added_tokens"]]
    tokens += [token for token in added if token not in tokens]
    tokens += [f"<unused{i}>" for i in range(VOCABULARY - len(tokens))]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in vocabulary["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in added else 1 for token in tokens])
    writer.add_token_merges(merges)
    writer.add_eos_token_id(tokens.index(added[-1]))

    def matrix(name, *shape):
        blocks = draw.integers(0, 256, (int(np.prod(shape)) // width, size), dtype=np.uint8)
        for at in scales:
            blocks[:, at : at + 2] = np.frombuffer(struct.pack("<e", 2e-4), np.uint8)
        if form == "MXFP4":
            blocks[:, 0] = 120
        row = shape[-1] // width * size
        writer.add_tensor(name, blocks.reshape(*shape[:-1], row), raw_dtype=kind)

    def vector(name, *shape, spread=None):
        values = np.ones(shape, np.float32) if spread is None else draw.standard_normal(shape, dtype=np.float32) * spread
        writer.add_tensor(name, values)

    matrix("token_embd.weight", VOCABULARY, HIDDEN)
    matrix("output.weight", VOCABULARY, HIDDEN)
    vector("output_norm.weight", HIDDEN)
    for layer in range(LAYERS):
        at = f"blk.{layer}."
        vector(at + "attn_norm.weight", HIDDEN)
        vector(at + "ffn_norm.weight", HIDDEN)
        vector(at + "attn_q_norm.weight", HEAD_DIM)
        vector(at + "attn_k_norm.weight", HEAD_DIM)
        vector(at + "ffn_gate_inp.weight", EXPERTS, HIDDEN, spread=0.05)
        for name, (_, rows, inputs) in zip(["attn_q", "attn_k", "attn_v", "attn_output"], layer_matrices()):
            matrix(f"{at}{name}.weight", rows, inputs)
        for name, (_, rows, inputs) in zip(["ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"], expert_matrices()):
            matrix(f"{at}{name}.weight", EXPERTS, rows, inputs)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()


def main():
    if len(sys.argv) != 3 or sys.argv[1] not in ["bf16", "fp8", "int4", *BLOCKS]:
        sys.exit(__doc__)
    form, out = sys.argv[1], pathlib.Path(sys.argv[2])
    (write_gguf if form in BLOCKS else write_folder)(form, out)


if __name__ == "__main__":
    main()
