"""megatron-core's GPTModel from a small config, with weights that do not depend on the layout."""

from __future__ import annotations

import copy
import hashlib
import math
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from megaopus.distributed.config import ParallelConfig
from megaopus.distributed.mesh import Mesh
from megaopus.distributed.shards import is_split, mark_expert
from megaopus.models.config import ModelConfig
from megaopus.models.counter_normals import fill_normal
from megaopus.models.flops import padded_vocab
from megaopus.models.fused import fill_in_kernels, token_losses
from megaopus.models.names import EXPERT

Start = Callable[[str, Tensor], Tensor]
"""(name in the whole model, parameter) -> this rank's part of the weights to begin with, in their own precision."""
_ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "swiglu": F.silu,
    "geglu_tanh": partial(F.gelu, approximate="tanh"),
}


def transformer_config(
    model: ModelConfig,
    mesh: Mesh,
    parallel: ParallelConfig,
    *,
    bf16: bool,
    recompute: bool,
    fused: bool = False,
    adds_gradients: bool = False,
) -> Any:
    """megatron's TransformerConfig for this model on this mesh.

    ``fused``: SwiGLU, rotary positions and token losses take one kernel each. ``adds_gradients``: so do products that
    give a weight's gradient and the sum of it, which megatron's DDP keeps.
    """
    from megatron.core.transformer import TransformerConfig

    dtype = torch.bfloat16 if bf16 else torch.float32
    made = TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        **_of_layers(model),
        tensor_model_parallel_size=mesh.shape.tp,
        pipeline_model_parallel_size=mesh.shape.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
        expert_model_parallel_size=mesh.shape.ep,
        expert_tensor_parallel_size=mesh.shape.expert_tp,
        # The interleaved schedule posts each receive on its own: gloo pairs batched ones wrongly, without an error.
        overlap_p2p_comm=parallel.vpp > 1,
        batch_p2p_comm=parallel.vpp == 1,
        batch_p2p_sync=False,  # a wait for the device that PyTorch needed before its pull request 82450, of 2022
        context_parallel_size=mesh.shape.cp,
        sequence_parallel=parallel.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=bf16,
        use_cpu_initialization=mesh.on_cpu,
        deterministic_mode=mesh.deterministic and not mesh.on_cpu,  # the CPU repeats itself without
        bias_activation_fusion=fused and model.activation == "swiglu",
        recompute_granularity="full" if recompute else None,
        recompute_method="uniform" if recompute else None,
        recompute_num_layers=1 if recompute else None,
        **_of_experts(model, mesh, bf16),
    )
    made.fused_losses = fused
    if fused:
        fill_in_kernels(made, model.position == "rope", adds_gradients)
    return made


def _of_layers(model: ModelConfig) -> dict[str, Any]:
    """Return what megatron's TransformerConfig says of attention, norms and MLP."""
    return {
        "num_attention_heads": model.num_heads,
        "num_query_groups": model.derived_kv_heads(),
        "kv_channels": model.derived_head_dim(),
        "ffn_hidden_size": model.derived_ffn(),
        "normalization": "LayerNorm" if model.norm == "layernorm" else "RMSNorm",
        "layernorm_epsilon": model.norm_epsilon,
        "layernorm_zero_centered_gamma": model.norm == "rmsnorm_plus_1",
        "window_size": None if model.window is None else (model.window - 1, 0),
        "qk_layernorm": model.qk_norm,
        "gated_linear_unit": model.gated,
        "activation_func": _ACTIVATIONS[model.activation],
        "add_bias_linear": model.bias,
        "add_qkv_bias": model.derived_qkv_bias(),
        "hidden_dropout": model.dropout,
        "attention_dropout": model.dropout,
        "init_method_std": model.init_std,
    }


def _of_experts(model: ModelConfig, mesh: Mesh, bf16: bool) -> dict[str, Any]:
    """Return what megatron's TransformerConfig says of experts: nothing where there are none."""
    if model.num_experts is None:
        return {}
    router = model.router
    return {
        "num_moe_experts": model.num_experts,
        "moe_layer_freq": [int(model.has_experts(layer)) for layer in range(model.num_layers)],
        "moe_ffn_hidden_size": model.derived_expert_ffn(),
        "moe_shared_expert_intermediate_size": model.shared_expert_ffn_hidden_size,
        "moe_router_topk": model.experts_per_token,
        "moe_router_score_function": router.scores,
        "moe_router_pre_softmax": not router.normalized,
        "moe_router_topk_scaling_factor": router.scale,
        "moe_router_dtype": "fp32" if bf16 else None,
        "moe_router_load_balancing_type": "seq_aux_loss" if router.balance_over == "sequence" else "aux_loss",
        "moe_aux_loss_coeff": router.balance_loss,
        "moe_z_loss_coeff": router.z_loss or None,
        "moe_router_enable_expert_bias": router.bias_rate is not None,
        "moe_router_bias_update_rate": router.bias_rate or 0.0,
        "moe_expert_capacity_factor": model.expert_capacity,
        # a group's tokens all go to each of its ranks, or each to those of its experts, which takes streams of a GPU
        "moe_token_dispatcher_type": "allgather" if mesh.on_cpu else "alltoall",
    }


def _block_spec(model: ModelConfig, config: Any, mesh: Mesh, vp_stage: int | None) -> Any:
    """megatron's spec of the layers of one model chunk, with our attention, linear layers and norms in it."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    from megaopus.models.attention import CausalAttention
    from megaopus.models.linear import ColumnLinear, RowLinear
    from megaopus.models.norm import Norm

    layer = get_gpt_layer_local_spec(qk_layernorm=model.qk_norm, normalization=config.normalization)
    layer.submodules.input_layernorm = Norm
    layer.submodules.pre_mlp_layernorm = Norm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = CausalAttention
    attention.linear_qkv, attention.linear_proj = ColumnLinear, RowLinear
    mlp = layer.submodules.mlp.submodules
    mlp.linear_fc1, mlp.linear_fc2 = ColumnLinear, RowLinear
    if model.qk_norm:
        attention.q_layernorm = attention.k_layernorm = Norm
    num_layers = get_num_layers_to_build(config, vp_stage, mesh.pp_rank)
    specs = [layer] * num_layers
    if model.num_experts is not None:
        from megaopus.models.experts import mixture_spec, permute_without_waiting

        if not mesh.on_cpu:
            permute_without_waiting()
        mixed = copy.deepcopy(layer)
        # CUDA has grouped products of 16-bit numbers
        grouped = config.fused_losses and hasattr(F, "grouped_mm") and (mesh.on_cpu or config.bf16)
        mixed.submodules.mlp = mixture_spec(model.shared_expert_ffn_hidden_size is not None, grouped)
        first = get_transformer_layer_offset(config, vp_stage, mesh.pp_rank)
        specs = [mixed if model.has_experts(first + number) else layer for number in range(num_layers)]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=Norm)


def build_gpt(
    model: ModelConfig, config: Any, mesh: Mesh, *, vocab_size: int, max_positions: int, chunk: int = 0
) -> Any:
    """Model chunk ``chunk`` of this rank's stage of the GPT, on the mesh's device, not yet initialised.

    ``vocab_size`` is the true one, which is padded here. Forward: (tokens (B, S), position ids (B, S), None,
    labels=(B, S)) -> loss (B, S), S this context-parallel rank's part of the positions.
    """
    from megatron.core.models.gpt import GPTModel

    vp_stage = None if (chunks := config.virtual_pipeline_model_parallel_size) is None else chunk

    class GPT(GPTModel):
        def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
            """(B, S) token losses from (S, B, V) logits; torch's own kernels where the vocabulary is whole."""
            if config.fused_losses:
                return token_losses(logits, labels, mesh.tp_group)
            if mesh.shape.tp > 1:
                return super().compute_language_model_loss(labels, logits)
            seq_len, batch, vocab = logits.shape
            losses = F.cross_entropy(logits.view(-1, vocab).float(), labels.t().reshape(-1), reduction="none")
            return losses.view(seq_len, batch).t()

    gpt = GPT(
        config=config,
        transformer_layer_spec=_block_spec(model, config, mesh, vp_stage),
        vocab_size=padded_vocab(vocab_size),
        max_sequence_length=max_positions,
        pre_process=mesh.pp_rank == 0 and chunk == 0,
        post_process=mesh.is_last_stage and chunk == (chunks or 1) - 1,
        parallel_output=True,
        share_embeddings_and_output_weights=model.tied,
        position_embedding_type={"learned": "learned_absolute", "rope": "rope", "none": "none"}[model.position],
        rotary_base=model.rope_base,
        vp_stage=vp_stage,
    )
    if model.position == "rope" and mesh.shape.cp > 1:
        from megaopus.models.rotary import PartRotary

        gpt.rotary_pos_emb = PartRotary(
            config.kv_channels,
            rotary_percent=1.0,
            rotary_base=model.rope_base,
            use_cpu_initialization=config.use_cpu_initialization,
            cp_group=mesh.cp_group,
        )
    if model.rope_scaling.factor is not None:
        from megaopus.models.rotary import scaled

        gpt.rotary_pos_emb.inv_freq = scaled(gpt.rotary_pos_emb.inv_freq, model.rope_scaling)
    if gpt.pre_process and model.embedding_scale is not None:
        gpt.embedding.register_forward_hook(partial(_scale, model.embedding_scale))
    if gpt.post_process:
        mask_padding(gpt.output_layer, vocab_size, mesh)
    gpt.first_expert = mesh.ep_rank * ((model.num_experts or 0) // mesh.shape.ep)
    for name, parameter in gpt.named_parameters():
        if EXPERT in name:
            mark_expert(parameter)
    return gpt.to(mesh.device)


def _scale(factor: float, module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """Multiply embeddings by a factor rounded to their type, as transformers' Gemma does."""
    return output * torch.tensor(factor, dtype=output.dtype, device=output.device)


def mask_padding(output_layer: nn.Module, vocab_size: int, mesh: Mesh) -> None:
    """Give this rank's columns of the logits beyond ``vocab_size`` no probability: -inf, as they leave the layer.

    They are filled in place and unseen by autograd, so that no second copy of the logits is made: a softmax's gradient
    there is zero by itself, and so is that of the padded rows of the weights.
    """
    columns = padded_vocab(vocab_size) // mesh.shape.tp
    own = max(0, vocab_size - mesh.tp_rank * columns)
    if own >= columns:
        return

    @torch.no_grad()
    def fill(module: nn.Module, args: Any, output: tuple[Tensor, Tensor | None]) -> None:
        output[0][..., own:] = -math.inf

    output_layer.register_forward_hook(fill)


def model_chunks(module: nn.Module) -> list[Any]:
    """The GPTModels of a rank: several, in a ModuleList, under virtual pipeline parallelism."""
    return list(module) if isinstance(module, nn.ModuleList) else [module]


def global_names(module: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """(local name, name in the whole model, parameter) of each parameter of a rank.

    The local name is that of ``module.named_parameters()``: the chunk's number comes first where there are several.
    """
    chunks = model_chunks(module)
    for index, chunk in enumerate(chunks):
        prefix = f"{index}." if len(chunks) > 1 else ""
        layers = chunk.decoder.layers
        offset = layers[0].layer_number - 1 if len(layers) else 0
        for name, parameter in chunk.named_parameters():
            whole = _renumbered(name, "decoder.layers.", offset)
            yield prefix + name, _renumbered(whole, EXPERT, chunk.first_expert), parameter


def _renumbered(name: str, before: str, offset: int) -> str:
    """Add ``offset`` to the number after ``before`` in a name, if that is in it."""
    return re.sub(rf"(?<={re.escape(before)})\d+", lambda found: str(int(found[0]) + offset), name, count=1)


def expert_biases(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name in the whole model, (E,) fp32 biases by which a layer's experts are chosen) of each layer that has some."""
    for each in module.modules():
        if (bias := getattr(each, "expert_bias", None)) is not None:
            yield f"decoder.layers.{each.layer}.mlp.router.expert_bias", bias


EMBEDDING = "embedding.word_embeddings.weight"


def canonical_names(module: nn.Module) -> Iterator[tuple[str, str]]:
    """(local name, name in the whole model) of each parameter of a rank; the copies of a tied matrix have one name."""
    for local, name, _ in global_names(module):
        yield local, EMBEDDING if is_tied(module) and name == "output_layer.weight" else name


def parts_of_model(num_layers: int) -> list[str]:
    """Name the parts that a model consists of, from the tokens to the logits; layers are counted from 0."""
    return ["embedding", *(f"layers.{number}" for number in range(num_layers)), "head"]


def part_of_model(name: str) -> str:
    """Say to which of its parts a parameter belongs, by its name in the whole model; the last norm is the head's."""
    if match := re.match(r"decoder\.(layers\.\d+)\.", name):
        return match[1]
    return "embedding" if name.startswith("embedding.") else "head"


def is_tied(module: nn.Module) -> bool:
    """Return whether the output layer is the embedding (on another pipeline stage, a copy of it)."""
    return bool(model_chunks(module)[0].share_embeddings_and_output_weights)


@torch.no_grad()
def initialize(module: nn.Module, model: ModelConfig, mesh: Mesh, seed: int, *, on_cpu: bool = True) -> None:
    """Draw each parameter by (seed, its name), so that the model is the same at every layout.

    Normal with ``init_std``; output projections of the blocks with init_std / sqrt(2 layers) (GPT-2); norms one (zero
    where one is added), biases zero. ``on_cpu``: whole, from a generator on the CPU, of which this rank's part is kept;
    else the part alone, on its device, by counters.
    """
    for _, name, parameter in global_names(module):
        if parameter.dim() == 1:
            parameter.fill_(0.0 if name.endswith("bias") or model.norm == "rmsnorm_plus_1" else 1.0)
            continue
        std = model.init_std
        if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
            std /= math.sqrt(2 * model.num_layers)
        shape, split = list(parameter.shape), is_split(parameter) and mesh.parts(parameter) > 1
        if split:
            shape[parameter.partition_dim] *= mesh.parts(parameter)  # type: ignore[attr-defined]
        # A tied output layer on a later stage starts as the embedding it will stay equal to.
        key = EMBEDDING if model.tied and name == "output_layer.weight" else name
        digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
        if on_cpu:
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            full = torch.randn(shape, generator=generator) * std
            parameter.copy_(mesh.part(full, parameter))
            continue
        places = [torch.arange(size, device=parameter.device) for size in shape]
        if split:
            axis = parameter.partition_dim  # type: ignore[attr-defined]
            places[axis] = mesh.part(places[axis].unsqueeze(1 - axis), parameter).flatten()
        fill_normal(parameter, std, int.from_bytes(digest[:8], "big"), places[0], places[1], shape[1])


@torch.no_grad()
def start_from(module: nn.Module, start: Start) -> None:
    """Copy to each parameter of a rank, and each bias by which experts are chosen, what ``start`` has for it."""
    parameters = dict(module.named_parameters())
    for local, name in canonical_names(module):
        parameters[local].copy_(start(name, parameters[local]))
    for name, bias in expert_biases(module):
        bias.copy_(start(name, bias))


def full_parameters(module: nn.Module, mesh: Mesh, values: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Every whole parameter by its whole-model name, on every rank, gathered over tp, ep and pp (a collective call).

    ``values`` (by whole-model name, shaped like this rank's parameters) is gathered instead of the weights, if given.
    """
    local: dict[str, Tensor] = {}
    parameters = dict(module.named_parameters())
    for own, name in canonical_names(module):
        parameter = parameters[own]
        value = (parameter if values is None else values[name]).detach()
        local[name] = mesh.whole(value, parameter).cpu()
    for group in (mesh.ep_group, mesh.pp_group):
        if (size := dist.get_world_size(group)) > 1:
            of_ranks: list[Any] = [None] * size
            dist.all_gather_object(of_ranks, local, group=group)
            local = {name: value for each in reversed(of_ranks) for name, value in each.items()}
    return local
