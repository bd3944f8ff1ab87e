"""Turns a dense Llama checkpoint into a Mixtral-shaped one whose experts are all copies of the dense branch.

    upcycle.py MODEL FOLDER [--experts 8] [--active 2] [--layers N] [--dtype float32|bfloat16] [--seed 0]

MODEL is a .gguf file or a folder in Hugging Face's layout. The weights of the active experts add up to one, so whatever the
(random) router chooses, the upcycled model says what the dense one says, up to rounding. `--experts 0` writes the dense model
itself: the twin to compare with when --layers cuts the model short.
"""

import argparse
import json
import pathlib

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

# Of a logit of the router: normalised inputs are about one in size, so the scores differ clearly but not absurdly.
ROUTER_SCALE = 1.0


def source(model):
    """What `from_pretrained` wants for a file or a folder."""
    model = pathlib.Path(model)
    if model.suffix == ".gguf":
        return str(model.parent), {"gguf_file": model.name}
    return str(model), {}


def config(dense, experts, active, layers, dtype):
    """config.json as Mixtral (or, without experts, Llama) is published."""
    shape = {
        "architectures": ["MixtralForCausalLM" if experts else "LlamaForCausalLM"],
        "model_type": "mixtral" if experts else "llama",
        "torch_dtype": dtype,
        "num_hidden_layers": layers,
        "head_dim": dense.head_dim,
        "hidden_act": dense.hidden_act,
        "rope_theta": dense.rope_parameters["rope_theta"],
    }
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "rms_norm_eps",
            "max_position_embeddings", "tie_word_embeddings", "bos_token_id", "eos_token_id")
    shape |= {key: getattr(dense, key) for key in same}
    if experts:
        shape |= {"num_local_experts": experts, "num_experts_per_tok": active, "sliding_window": None}
    return shape


def layer(tensors, index, experts, generator):
    """One layer under Mixtral's names."""
    prefix = f"model.layers.{index}."
    of_layer = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    if not experts:
        return of_layer
    out = {name: tensor for name, tensor in of_layer.items() if ".mlp." not in name}
    block = f"{prefix}block_sparse_moe."
    hidden = of_layer[f"{prefix}mlp.gate_proj.weight"].shape[1]
    out[f"{block}gate.weight"] = torch.randn(experts, hidden, generator=generator) * ROUTER_SCALE / hidden**0.5
    for expert in range(experts):
        for theirs, ours in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
            out[f"{block}experts.{expert}.{theirs}.weight"] = of_layer[f"{prefix}mlp.{ours}.weight"]
    return out


def save(tensors, path, dtype):
    """Copies share memory, which safetensors refuses, so each is cloned: one shard at a time is in memory."""
    save_file({name: tensor.detach().to(dtype).contiguous().clone() for name, tensor in tensors.items()}, path,
              metadata={"format": "pt"})


def upcycle(model, folder, experts=8, active=2, layers=None, dtype="float32", seed=0):
    """Writes the checkpoint, a shard a layer, config.json last: a folder that has one is whole."""
    path, extra = source(model)
    dense = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **extra)
    if dense.config.model_type != "llama":
        raise SystemExit(f"{model} is of type {dense.config.model_type}, llama is needed")
    layers = layers or dense.config.num_hidden_layers
    tensors = dense.state_dict()
    if dense.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith("model.layers.")}
    count, places, size = layers + 1, {}, 0
    for index in range(count):
        shard = layer(tensors, index, experts, generator) if index < layers else rest
        file = f"model-{index + 1:05}-of-{count:05}.safetensors"
        save(shard, folder / file, getattr(torch, dtype))
        places |= dict.fromkeys(shard, file)
        size += sum(tensor.numel() for tensor in shard.values()) * getattr(torch, dtype).itemsize
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    AutoTokenizer.from_pretrained(path, **extra).save_pretrained(folder)
    shape = config(dense.config, experts, active, layers, dtype)
    (folder / "config.json").write_text(json.dumps(shape, indent=1))
    return size


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("folder")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--active", type=int, default=2)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    size = upcycle(asked.model, asked.folder, asked.experts, asked.active, asked.layers, asked.dtype, asked.seed)
    print(f"{asked.folder}: {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
