"""Says what of a Hugging Face ``config.json`` our model settings can express, family by family.

Read as JSON, without transformers; defaults, which files may leave out, are those of transformers' own classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from megaopus.errors import ModelError
from megaopus.models.config import ModelConfig, RopeScaling, RouterConfig

Json = Mapping[str, Any]

ACTIVATIONS = {
    "gelu": ("gelu", None),
    "gelu_new": ("gelu_tanh", "geglu_tanh"),
    "gelu_pytorch_tanh": ("gelu_tanh", "geglu_tanh"),
    "silu": (None, "swiglu"),
    "swish": (None, "swiglu"),
}
"""Hugging Face's name -> our names where the MLP is plain and where it is gated; None: we do not have it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One kind of model: which files are of it, its settings in our words, and what it may not have."""

    architecture: str
    """As ``architectures`` in config.json names the class."""
    settings: Callable[[Json], dict[str, Any]]
    """config.json -> our model settings."""
    written: Callable[[ModelConfig], dict[str, Any]]
    """Our model settings, every one of them given -> config.json without architecture and numbers of tokens."""
    only: Mapping[str, tuple[Any, ...]]
    """Key -> the values that our model can express; the first is transformers' default where the file has none."""
    fused: bool = False
    """GPT-2's names: one tensor of queries, keys and values, matrices (inputs, outputs)."""
    experts: str = "mlp"
    """What a layer's experts are called: as Qwen's, or as Mixtral's (``block_sparse_moe``)."""


def model_config(config: Json) -> ModelConfig:
    """Return our model settings for a ``config.json``. Raises ModelError, by name, for what they cannot express."""
    family = family_of(config)
    if wrong := list(_refusals(family, config)):
        raise ModelError("; ".join(wrong))
    return ModelConfig(**family.settings(config))


def family_of(config: Json) -> Family:
    """Find the family of a ``config.json``. Raises ModelError if it is none of ours."""
    if "auto_map" in config:
        raise ModelError("auto_map: the model's code comes with its weights, and is not run")
    if "quantization_config" in config:
        raise ModelError("quantization_config: weights are quantised; save them in bf16, fp16 or fp32")
    names = config.get("architectures") or []
    for name in names:
        if name in FAMILIES:
            return FAMILIES[name]
    what = ", ".join(names) or f"model_type {config.get('model_type')!r}"
    raise ModelError(f"{what} is no model that is known here ({', '.join(sorted(FAMILIES))})")


def _refusals(family: Family, config: Json) -> Iterator[str]:
    """Yield what a config has that our model cannot express."""
    for key, values in family.only.items():
        if (value := config.get(key, values[0])) not in values:
            yield f"{key}={value!r} (only {' or '.join(map(repr, values))})"
    layers = set(config.get("layer_types") or ())
    expected = "sliding_attention" if family.settings(config).get("window") else "full_attention"
    if wrong := layers - {expected}:
        yield f"layer_types has {', '.join(sorted(wrong))} (only {expected})"


def family_for(model: ModelConfig) -> Family:
    """Find the family whose config.json says all that ``model`` is. Raises ModelError if there is none."""
    wanted = normal(model)
    tried = []
    for family in FAMILIES.values():
        try:
            found = normal(model_config({**family.written(wanted), "architectures": [family.architecture]}))
        except (ModelError, KeyError):
            continue
        if found == wanted:
            return family
        differing = [each.name for each in fields(found) if getattr(found, each.name) != getattr(wanted, each.name)]
        tried.append((len(differing), family.architecture, differing))
    nearest = min(tried)
    named = ", ".join(f"{name}={getattr(wanted, name)!r}" for name in nearest[2])
    raise ModelError(f"no Hugging Face model is known that has {named}; the nearest is {nearest[1]}")


_ROUTES = ("scores", "normalized", "scale", "bias_rate")
"""Settings of a router that change what a model computes."""


def normal(model: ModelConfig) -> ModelConfig:
    """The same model with what is derived put in, and without what training alone depends on."""
    return replace(
        model,
        hf=None,
        dropout=0.0,
        init_std=ModelConfig().init_std,
        router=RouterConfig(**{name: getattr(model.router, name) for name in _ROUTES}),
        expert_ffn_hidden_size=model.derived_expert_ffn() if model.num_experts is not None else None,
        num_kv_heads=model.derived_kv_heads(),
        head_dim=model.derived_head_dim(),
        ffn_hidden_size=model.derived_ffn(),
        qkv_bias=model.derived_qkv_bias(),
        max_positions=model.max_positions if model.position == "learned" else None,
    )


# -- families ----------------------------------------------------------------------------------------------------------


def _gpt2(config: Json) -> dict[str, Any]:
    return {
        "num_layers": config.get("n_layer", 12),
        "hidden_size": config.get("n_embd", 768),
        "num_heads": config.get("n_head", 12),
        "ffn_hidden_size": config.get("n_inner"),
        "vocab_size": config.get("vocab_size", 50257),
        "max_positions": config.get("n_positions", 1024),
        "position": "learned",
        "norm": "layernorm",
        "norm_epsilon": config.get("layer_norm_epsilon", 1e-5),
        "activation": _activation(config.get("activation_function", "gelu_new"), gated=False),
        "bias": True,
        "tied": config.get("tie_word_embeddings", True),
    }


def _gpt2_json(model: ModelConfig) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "n_layer": model.num_layers,
        "n_embd": model.hidden_size,
        "n_head": model.num_heads,
        "n_inner": model.ffn_hidden_size,
        "n_positions": model.max_positions,
        "n_ctx": model.max_positions,
        "vocab_size": model.vocab_size,
        "layer_norm_epsilon": model.norm_epsilon,
        "activation_function": {"gelu": "gelu", "gelu_tanh": "gelu_new"}[model.activation],
        "tie_word_embeddings": model.tied,
    }


def _llama_json(model: ModelConfig, kind: str = "llama", activation: str = "silu", **more: Any) -> dict[str, Any]:
    scaling = {"rope_type": "default"} if model.rope_scaling.factor is None else _scaling_json(model.rope_scaling)
    return {
        "model_type": kind,
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "intermediate_size": model.ffn_hidden_size,
        "vocab_size": model.vocab_size,
        "rms_norm_eps": model.norm_epsilon,
        "hidden_act": activation,
        "tie_word_embeddings": model.tied,
        # the old place and the new one
        "rope_theta": float(model.rope_base),
        "rope_parameters": {"rope_theta": float(model.rope_base), **scaling},
        **({} if model.rope_scaling.factor is None else {"rope_scaling": scaling}),
        **more,
    }


def _scaling_json(scaling: RopeScaling) -> dict[str, Any]:
    if scaling.low_freq_factor is None:
        return {"rope_type": "linear", "factor": scaling.factor}
    found = {theirs: getattr(scaling, ours) for theirs, ours in _LLAMA_3.items()}
    return {"rope_type": "llama3", "factor": scaling.factor, **found}


_LLAMA_3 = {
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "original_max_positions",
}
"""Their names of Llama 3.1's numbers -> ours."""


def _llama(
    config: Json,
    *,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    tied: bool = False,
    activation: str = "silu",
    **more: Any,
) -> dict[str, Any]:
    """Llama's form; the rest says what a family has beside it, and its own defaults."""
    heads, hidden = _required(config, "num_attention_heads"), _required(config, "hidden_size")
    size = config.get("head_dim") or head_dim or hidden // heads
    return {
        "num_layers": _required(config, "num_hidden_layers"),
        "hidden_size": hidden,
        "num_heads": heads,
        "num_kv_heads": config.get("num_key_value_heads") or kv_heads or heads,
        "head_dim": size,
        "ffn_hidden_size": _required(config, "intermediate_size"),
        "vocab_size": _required(config, "vocab_size"),
        "position": "rope",
        **_rope(config),
        "norm": "rmsnorm",
        "norm_epsilon": config.get("rms_norm_eps", 1e-6),
        "activation": _activation(config.get("hidden_act", activation), gated=True),
        "bias": False,
        "tied": config.get("tie_word_embeddings", tied),
        **more,
    }


def _mistral(config: Json) -> dict[str, Any]:
    return _llama(config, kv_heads=8, window=config.get("sliding_window", 4096))


def _qwen2(config: Json) -> dict[str, Any]:
    return _llama(config, kv_heads=32, qkv_bias=True)


def _qwen3(config: Json) -> dict[str, Any]:
    return _llama(config, kv_heads=32, head_dim=128, qk_norm=True)


def _qwen3_moe(config: Json) -> dict[str, Any]:
    dense = list(config.get("mlp_only_layers") or ())
    if dense != list(range(len(dense))):
        raise ModelError(f"mlp_only_layers={dense!r} (only the first so many)")
    return {
        **_llama(config, kv_heads=4, qk_norm=True),
        "num_experts": config.get("num_experts", config.get("num_local_experts", 128)),
        "experts_per_token": config.get("num_experts_per_tok", 8),
        "expert_ffn_hidden_size": config.get("moe_intermediate_size", 768),
        "first_dense_layers": len(dense),
        "router": RouterConfig(normalized=config.get("norm_topk_prob", False)),
    }


def _mixtral(config: Json) -> dict[str, Any]:
    return {
        **_llama(config, kv_heads=8, window=config.get("sliding_window")),
        "num_experts": config.get("num_local_experts", config.get("num_experts", 8)),
        "experts_per_token": config.get("num_experts_per_tok", 2),
        "expert_ffn_hidden_size": _required(config, "intermediate_size"),
    }


def _gemma(config: Json) -> dict[str, Any]:
    activation = config.get("hidden_activation") or "gelu_pytorch_tanh"
    found = _llama({**config, "hidden_act": activation}, kv_heads=16, head_dim=256, tied=True)
    return {**found, "norm": "rmsnorm_plus_1", "embedding_scale": found["hidden_size"] ** 0.5}


def _mistral_json(model: ModelConfig) -> dict[str, Any]:
    return _llama_json(model, "mistral", sliding_window=model.window)


def _qwen2_json(model: ModelConfig) -> dict[str, Any]:
    return _llama_json(model, "qwen2")


def _qwen3_json(model: ModelConfig) -> dict[str, Any]:
    return _llama_json(model, "qwen3", attention_bias=False)


def _qwen3_moe_json(model: ModelConfig) -> dict[str, Any]:
    return _llama_json(
        model,
        "qwen3_moe",
        attention_bias=False,
        num_experts=model.num_experts,
        num_experts_per_tok=model.experts_per_token,
        moe_intermediate_size=model.expert_ffn_hidden_size,
        norm_topk_prob=model.router.normalized,
        mlp_only_layers=list(range(model.first_dense_layers)),
        decoder_sparse_step=1,
        router_aux_loss_coef=model.router.balance_loss,
    )


def _mixtral_json(model: ModelConfig) -> dict[str, Any]:
    return _llama_json(
        model,
        "mixtral",
        sliding_window=model.window,
        num_local_experts=model.num_experts,
        num_experts_per_tok=model.experts_per_token,
        router_aux_loss_coef=model.router.balance_loss,
    )


def _gemma_json(model: ModelConfig) -> dict[str, Any]:
    return _llama_json(model, "gemma", "gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh")


def _required(config: Json, key: str) -> Any:
    if key not in config:
        raise ModelError(f"config.json has no {key}")
    return config[key]


def _activation(name: str, *, gated: bool) -> str:
    found = ACTIVATIONS.get(name, (None, None))[gated]
    if found is None:
        known = ", ".join(key for key, pair in ACTIVATIONS.items() if pair[gated])
        raise ModelError(f"activation {name!r} (only {known})")
    return found


def _rope(config: Json) -> dict[str, Any]:
    """Base and scaling of rotary positions, from transformers 5's ``rope_parameters`` or the keys before it."""
    given: Json = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = given.get("rope_type", given.get("type", "default"))
    base = given.get("rope_theta", config.get("rope_theta", 10000))
    if base != int(base):
        raise ModelError(f"rope_theta={base!r} is no whole number")
    share = given.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if share != 1:
        raise ModelError(f"partial_rotary_factor={share!r} (only 1)")
    if kind == "default":
        return {"rope_base": int(base), "rope_scaling": RopeScaling()}
    keys = {"factor": "factor"}
    if kind == "llama3":
        keys |= _LLAMA_3
    elif kind != "linear":
        raise ModelError(f"rotary scaling {kind!r} (only default, linear, llama3)")
    if missing := keys.keys() - given.keys():
        raise ModelError(f"rotary scaling {kind!r} without {', '.join(sorted(missing))}")
    scaling = RopeScaling(**{ours: given[theirs] for theirs, ours in keys.items()})
    return {"rope_base": int(base), "rope_scaling": scaling}


_FULL_ATTENTION = {"use_sliding_window": (False,), "pretraining_tp": (1,)}
_NO_BIAS = {"attention_bias": (False,)}
FAMILIES: Mapping[str, Family] = {
    family.architecture: family
    for family in (
        Family(
            architecture="GPT2LMHeadModel",
            settings=_gpt2,
            written=_gpt2_json,
            only={
                "scale_attn_weights": (True,),
                "scale_attn_by_inverse_layer_idx": (False,),
                "add_cross_attention": (False,),
            },
            fused=True,
        ),
        Family(
            architecture="LlamaForCausalLM",
            settings=_llama,
            written=_llama_json,
            only={**_NO_BIAS, "mlp_bias": (False,), "pretraining_tp": (1,)},
        ),
        Family(architecture="MistralForCausalLM", settings=_mistral, written=_mistral_json, only={}),
        Family(architecture="Qwen2ForCausalLM", settings=_qwen2, written=_qwen2_json, only=_FULL_ATTENTION),
        Family(
            architecture="Qwen3ForCausalLM", settings=_qwen3, written=_qwen3_json, only={**_NO_BIAS, **_FULL_ATTENTION}
        ),
        Family(
            architecture="Qwen3MoeForCausalLM",
            settings=_qwen3_moe,
            written=_qwen3_moe_json,
            only={**_NO_BIAS, "use_sliding_window": (False,), "decoder_sparse_step": (1,)},
        ),
        Family(
            architecture="MixtralForCausalLM",
            settings=_mixtral,
            written=_mixtral_json,
            only={"router_jitter_noise": (0, 0.0)},
            experts="block_sparse_moe",
        ),
        Family(architecture="GemmaForCausalLM", settings=_gemma, written=_gemma_json, only=_NO_BIAS),
    )
}
