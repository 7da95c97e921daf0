"""Models of Hugging Face's transformers as ours: which keys of `model` make them the same function.

Sizes follow from the tensors' shapes; what shapes don't show (epsilons, the base of the rotary
wavelengths, tied tables) stands in `config.json`, and is compared and written here.
"""

import math
from collections.abc import Mapping
from typing import Any

from lamina.platform.errors import UserError

_EXACT = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


def required(layout: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of our model that a `config.json` asks for.

    Args:
        layout: "hf-llama" or "hf-vit".
        config: of the folder; empty where there is none: then only what holds for all of them.

    Raises:
        UserError: it describes something that our models are not.
    """
    try:
        return _llama(config) if layout == "hf-llama" else _vit(config)
    except (TypeError, AttributeError) as error:
        raise UserError(f"config.json is damaged: a value is of another type ({error})") from error


def _llama(config: Mapping[str, Any]) -> dict[str, Any]:
    keys: dict[str, Any] = {"embedding_scale": 1.0}
    if not config:
        return keys
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope = rope if isinstance(rope, dict) else {"rope_type": rope}
    heads, embed = config.get("num_attention_heads", 0), config.get("hidden_size", 0)
    units = config.get("head_dim") or 0
    _refuse(
        config,
        {
            "model_type": config.get("model_type", "llama") not in ("llama", "mistral"),
            "attention_bias": bool(config.get("attention_bias")),
            "mlp_bias": bool(config.get("mlp_bias")),
            "hidden_act": config.get("hidden_act", "silu") != "silu",
            "sliding_window": bool(config.get("sliding_window")),
            "rope_parameters": rope.get("rope_type", rope.get("type", "default")) != "default",
            "head_dim": bool(units and heads) and units * heads != embed,
        },
    )
    keys["norm_epsilon"] = config.get("rms_norm_eps", 1e-6)
    keys["rope_theta"] = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    keys["tied"] = config.get("tie_word_embeddings", False)
    return keys


def _vit(config: Mapping[str, Any]) -> dict[str, Any]:
    keys: dict[str, Any] = {"pool": "token"}
    if not config:
        return keys
    _refuse(
        config,
        {
            "model_type": config.get("model_type", "vit") != "vit",
            "qkv_bias": not config.get("qkv_bias", True),
            "hidden_act": config.get("hidden_act", "gelu") not in _EXACT,
        },
    )
    keys["norm_epsilon"] = config.get("layer_norm_eps", 1e-12)
    keys["activation"] = _EXACT[config.get("hidden_act", "gelu")]
    return keys


def _refuse(config: Mapping[str, Any], problems: Mapping[str, bool]) -> None:
    bad = [f"{key} = {config.get(key)!r}" for key, problem in problems.items() if problem]
    if bad:
        raise UserError(f"config.json says {', '.join(bad)}, which our model doesn't have")


def check(layout: str, config: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """Compares a `config.json` with the keys of `model` of a run.

    Raises:
        UserError: they would compute something else; the message has the flags that make them same.
    """
    wrong = {
        key: value
        for key, value in required(layout, config).items()
        if not _same(value, model.get(key))
    }
    if wrong:
        flags = " ".join(f"--config.model.{key}={value}" for key, value in wrong.items())
        raise UserError(f"these weights need other keys of the model: {flags}")


def _same(one: Any, other: Any) -> bool:
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in (one, other))
    return math.isclose(one, other, rel_tol=1e-9) if numbers else one == other


def describe(layout: str, model: Mapping[str, Any], shapes: Mapping[str, Any], spec: Any) -> dict:
    """The `config.json` of one of our models.

    Args:
        layout: "hf-llama" or "hf-vit".
        model: its keys, resolved.
        shapes: paths to the shapes of one layer's parameters.
        spec: of the data.

    Raises:
        UserError: the layout can't say what this model does.
    """
    if layout == "hf-llama":
        embed, heads, _ = shapes["query/kernel"]
        if model["embedding_scale"] != 1.0:
            raise UserError(
                "hf-llama has no factor of the embeddings: it can hold models with "
                "model.embedding_scale = 1 only"
            )
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": embed,
            "intermediate_size": shapes["up/kernel"][-1],
            "num_hidden_layers": shapes["depth"],
            "num_attention_heads": heads,
            "num_key_value_heads": shapes["key/kernel"][-2],
            "head_dim": embed // heads,
            "max_position_embeddings": spec.input_shape[0],
            "rms_norm_eps": model["norm_epsilon"],
            "rope_theta": model["rope_theta"],
            "rope_parameters": {"rope_type": "default", "rope_theta": model["rope_theta"]},
            "tie_word_embeddings": model["tied"],
            "vocab_size": spec.outputs,
        }
    if model["pool"] != "token":
        raise UserError('hf-vit has a class token: it can hold models with model.pool="token" only')
    embed, heads, _ = shapes["query/kernel"]
    height, width, channels = spec.input_shape
    return {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        "hidden_act": "gelu" if model["activation"] == "gelu" else "gelu_pytorch_tanh",
        "hidden_size": embed,
        "intermediate_size": shapes["up/kernel"][-1],
        "num_hidden_layers": shapes["depth"],
        "num_attention_heads": heads,
        "num_channels": channels,
        "image_size": height if height == width else [height, width],
        "patch_size": model["patch"],
        "layer_norm_eps": model["norm_epsilon"],
        "qkv_bias": True,
        "id2label": {str(i): f"LABEL_{i}" for i in range(spec.outputs)},
        "label2id": {f"LABEL_{i}": i for i in range(spec.outputs)},
    }
