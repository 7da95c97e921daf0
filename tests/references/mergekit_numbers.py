"""Writes mergekit's numbers on a tiny Llama, for tests/platform/merging/test_mergekit.py.

Run in an environment with mergekit 0.1.5 (which brings torch):
    python tests/references/mergekit_numbers.py tests/platform/merging/mergekit.npz
"""

import json
import os
import sys
import tempfile
from importlib import metadata
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
from safetensors.numpy import load_file, save_file

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 1,
    "vocab_size": 32,
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def shapes() -> dict[str, tuple[int, ...]]:
    width, hidden, kv = 16, 24, 8
    layer = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (kv, width),
        "self_attn.v_proj": (kv, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (hidden, width),
        "mlp.up_proj": (hidden, width),
        "mlp.down_proj": (width, hidden),
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
    }
    names = {f"model.layers.0.{name}.weight": shape for name, shape in layer.items()}
    ends = {"model.embed_tokens.weight": (32, width), "model.norm.weight": (width,)}
    return names | ends | {"lm_head.weight": (32, width)}


def checkpoints() -> list[dict[str, np.ndarray]]:
    """A base and three models near it; two of the norms are almost parallel."""
    random = np.random.default_rng(0)
    draw = lambda scale, shape: (scale * random.standard_normal(shape)).astype(np.float32)
    base = {n: draw(0.5, s) + np.float32(len(s) == 1) for n, s in shapes().items()}
    tuned = [{n: v + draw(0.1, v.shape) for n, v in base.items()} for _ in range(3)]
    for model in tuned[:2]:
        model["model.norm.weight"] = base["model.norm.weight"] + draw(1e-3, (16,))
    return [base, *tuned]


def recipes(folders: list[str]) -> dict[str, dict]:
    base, *tuned = folders
    weights = (0.5, 0.3, 0.9)

    def models(**parameters) -> list[dict]:
        return [
            {"model": m, "parameters": {"weight": w, **parameters}}
            for m, w in zip(tuned, weights, strict=True)
        ]

    found = {
        "linear": {"merge_method": "linear", "models": models()},
        "linear_sum": {
            "merge_method": "linear",
            "models": models(),
            "parameters": {"normalize": False},
        },
        "task_arithmetic": {
            "merge_method": "task_arithmetic",
            "base_model": base,
            "models": models(),
            "parameters": {"lambda": 0.7},
        },
        "model_stock": {
            "merge_method": "model_stock",
            "base_model": base,
            "models": [{"model": m} for m in tuned],
        },
    }
    for t in (0.0, 0.3, 1.0):
        found[f"slerp_{t}"] = {
            "merge_method": "slerp",
            "base_model": tuned[0],
            "models": [{"model": tuned[0]}, {"model": tuned[1]}],
            "parameters": {"t": t},
        }
    for density in (0.1, 0.2, 0.5, 1.0):
        for normalize in (True, False):
            found[f"ties_{density}_{normalize}"] = {
                "merge_method": "ties",
                "base_model": base,
                "models": models(density=density),
                "parameters": {"normalize": normalize, "lambda": 0.7},
            }
    return found


def main(out: str) -> None:
    with tempfile.TemporaryDirectory() as root:
        folders = []
        arrays = {}
        for number, tensors in enumerate(checkpoints()):
            folder = Path(root, f"m{number}")
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps(CONFIG))
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
            folders.append(str(folder))
            arrays |= {f"input{number}/{name}": value for name, value in tensors.items()}
        for key, recipe in recipes(folders).items():
            config = MergeConfiguration.model_validate(recipe | {"dtype": "float32"})
            target = Path(root, key)
            run_merge(config, str(target), MergeOptions(copy_tokenizer=False, random_seed=0))
            merged = {}
            for file in target.glob("*.safetensors"):
                merged |= load_file(file)
            arrays |= {f"{key}/{name}": value for name, value in merged.items()}
    versions = {name: metadata.version(name) for name in ("mergekit", "torch")}
    np.savez_compressed(out, versions=json.dumps(versions), **arrays)


if __name__ == "__main__":
    main(sys.argv[1])
