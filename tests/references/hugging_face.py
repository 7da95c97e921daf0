"""Writes tiny random models of Hugging Face's transformers, with inputs and logits, for the tests.

    python -m venv env && env/bin/pip install torch transformers
    env/bin/python tests/references/hugging_face.py

Each folder has what `save_pretrained` writes, and `expected.json` with the versions.
"""

import json
from pathlib import Path

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

HERE = Path(__file__).parent / "hugging_face"
LLAMA = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 64,
}
VIT = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "image_size": 12,
    "patch_size": 4,
    "num_labels": 5,
}


def write(name: str, model, inputs: torch.Tensor, **save) -> None:
    """Writes a model with large random weights, so that every part of it counts."""
    torch.manual_seed(1)
    with torch.no_grad():
        for key, value in model.named_parameters():
            noise = torch.randn_like(value) * 0.3
            value.copy_(1 + noise if "norm" in key and key.endswith("weight") else noise)
        logits = model.eval()(inputs).logits
    folder = HERE / name
    model.save_pretrained(folder, **save)
    (folder / "generation_config.json").unlink(missing_ok=True)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    expected = {"versions": versions, "inputs": inputs.tolist(), "logits": logits.tolist()}
    (folder / "expected.json").write_text(json.dumps(expected) + "\n")


def main() -> None:
    """Writes all."""
    torch.manual_seed(0)
    tokens = torch.randint(0, 61, (2, 9))
    write("llama", LlamaForCausalLM(LlamaConfig(**LLAMA)), tokens)
    tied = LlamaConfig(**LLAMA, tie_word_embeddings=True)
    write("llama_tied_sharded", LlamaForCausalLM(tied), tokens, max_shard_size="12KB")
    write("vit", ViTForImageClassification(ViTConfig(**VIT)), torch.randn(2, 3, 12, 12))


if __name__ == "__main__":
    main()
