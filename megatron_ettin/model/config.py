"""Build core's TransformerConfig, with a few fields of our layers, from a run's configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnBackend
from torch.nn import functional

from megatron_ettin.config.operations import ParallelConfig
from megatron_ettin.config.schema import Config, PrecisionConfig
from megatron_ettin.config.tables import OBJECTIVES, PRECISIONS
from megatron_ettin.platform.layers import LayerBackend

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class EttinTransformerConfig(TransformerConfig):
    """Core's configuration with the fields that core lacks."""

    causal: bool = False
    """Whether all rows are causal."""
    hybrid: bool = False
    """Whether some rows are causal and others are not."""
    attention_windows: dict[bool, int] = field(default_factory=lambda: {True: 64, False: 64})
    """Windows of local layers: keys i-window+1..i of a causal row (True), keys to each side of another row (False)."""
    global_attention_every: int = 3
    global_rope_theta: float = 160_000.0
    local_rope_theta: float = 160_000.0
    attention_output_dropout: float = 0.0
    vocab_size: int = 50_368
    backend: Any = field(default=None)
    """The layers' classes, a platform.layers.LayerBackend."""


def recomputation(parallel: ParallelConfig) -> dict[str, Any]:
    """Return core's keys that say which activations are kept, recomputed or offloaded.

    Full recomputation applies to the first layers of each stage, because backward needs the last ones immediately.
    """
    keys: dict[str, Any] = {
        "cpu_offloading": parallel.offload_layers > 0,
        "cpu_offloading_num_layers": parallel.offload_layers,
        "cpu_offloading_weights": False,
    }
    if parallel.recompute == "selective":
        keys |= {"recompute_granularity": "selective", "recompute_modules": parallel.recompute_modules}
    elif parallel.recompute == "full":
        every = parallel.recompute_layers is None
        keys |= {"recompute_granularity": "full", "recompute_method": "uniform" if every else "block"}
        keys["recompute_num_layers"] = parallel.recompute_layers or 1
    return keys


def number_formats(settings: PrecisionConfig) -> dict[str, Any]:
    """Return core's keys for the types of weights and activations and for the layers that compute in FP8."""
    precision = PRECISIONS[settings.name]
    dtype = DTYPES[precision.compute]
    return {
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "fp8": "hybrid" if precision.fp8_recipe else None,
        "fp8_recipe": precision.fp8_recipe or "delayed",
        "fp8_param": settings.fp8_weights,
        "first_last_layers_bf16": settings.bf16_first_layers + settings.bf16_last_layers > 0,
        "num_layers_at_start_in_bf16": settings.bf16_first_layers,
        "num_layers_at_end_in_bf16": settings.bf16_last_layers,
    }


def transformer_config(
    config: Config, backend: LayerBackend, pipeline_layout: str | None, on_gpu: bool
) -> EttinTransformerConfig:
    """Return core's configuration of a run. `pipeline_layout` comes from Topology and is None for a single stage."""
    model, parallel = config.model, config.parallel
    return EttinTransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        causal=config.causal,
        hybrid=OBJECTIVES[config.run.objective].is_hybrid,
        attention_windows=config.windows,
        global_attention_every=model.global_attention_every,
        global_rope_theta=model.global_rope_theta,
        local_rope_theta=model.local_rope_theta,
        attention_output_dropout=model.attention_output_dropout,
        vocab_size=model.vocab_size,
        backend=backend,
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
        pipeline_model_parallel_layout=pipeline_layout,
        sequence_parallel=parallel.sequence_parallel,
        **recomputation(parallel),
        overlap_p2p_comm=parallel.overlap and parallel.vpp > 1,
        tp_comm_overlap=parallel.tp_overlap,
        # Batched sends and receives of two stages cross when the previous and the next rank are the same, which gives
        # wrong losses without an error. Core leaves this check to Megatron-LM's argument parser.
        batch_p2p_comm=False,
        **number_formats(config.precision),
        calculate_per_token_loss=config.batch.loss_normalization == "global",
        normalization="LayerNorm",
        layernorm_epsilon=model.norm_eps,
        gated_linear_unit=True,
        activation_func=functional.gelu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # keep Transformer Engine from falling back to another kernel: its unfused one stores every score
        attention_backend=AttnBackend.fused if backend.core_attention is not None else AttnBackend.local,
        # core's initializers only mark the tensor-parallel attributes here; `model.init` sets every weight
        init_method=torch.nn.init.zeros_,
        output_layer_init_method=torch.nn.init.zeros_,
        embedding_init_method=torch.nn.init.zeros_,
        use_cpu_initialization=not on_gpu,
        deterministic_mode=config.runtime.deterministic and on_gpu,
        # captured graphs cast the weights to FP8 in each pass
        disable_parameter_transpose_cache=config.runtime.cuda_graph,
        # the fused product adds to core's gradient buffers, which DeepSpeed does not have
        gradient_accumulation_fusion=backend.fuses_weight_gradients and parallel.engine == "megatron",
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
    )
