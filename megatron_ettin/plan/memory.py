"""Bytes that training holds on one device, by part. Weights, gradients and optimizer are exact arithmetic over the
layout; activations are counted from the tensors that one layer saves for backward."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ettin.config.layouts import recomputed_modules, stage_layers
from megatron_ettin.config.precisions import PRECISIONS
from megatron_ettin.config.schema import Config
from megatron_ettin.config.sizes import layer_parameter_count
from megatron_ettin.config.zero import zero_stage

LOGITS_BYTES = 3 * 64 * 2**20  # one chunk of fp32 logits, its softmax and its gradient (model/loss.py)


@dataclass(frozen=True)
class Memory:
    """Bytes of the fullest pipeline rank."""

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    logits_bytes: int

    @property
    def total_bytes(self) -> int:
        return sum(
            (self.weights_bytes, self.gradients_bytes, self.optimizer_bytes, self.activations_bytes, self.logits_bytes)
        )


def estimate(config: Config, dp: int) -> Memory:
    """Memory of the first pipeline rank, which holds the embedding and the most micro-batches in flight."""
    model, parallel = config.model, config.parallel
    layers = sum(stage_layers(config)[:: parallel.pp])
    embedding = model.vocab_size * model.hidden_size
    head = model.hidden_size**2 + model.vocab_size if parallel.pp == 1 else 0
    parameters = (layers * layer_parameter_count(model) + embedding + head) // parallel.tp
    wide = PRECISIONS[config.precision.name].compute == "fp32"
    shards = dp if parallel.distributed_optimizer else 1
    stage, offloaded = zero_stage(parallel), parallel.zero_offload
    if stage:  # ZeRO also cuts over context parallelism, and has fp32 masters of fp32 weights below stage 3
        shards = dp * parallel.cp
    moments = 4 if config.optim.name == "muon" else 8  # one moment of muon's (all but the embedding), two of the others
    embedding_moments = (8 - moments) * embedding // parallel.tp
    masters = 0 if wide and (not stage or (stage == 3 and offloaded == "none")) else 4  # fp32, beside the weights
    state = (parameters * (moments + masters) + embedding_moments) // shards
    weights = parameters * (4 if wide else 2) // (shards if stage == 3 else 1)
    return Memory(
        weights_bytes=0 if offloaded == "all" else weights,
        gradients_bytes=parameters * (4 if config.precision.gradients == "fp32" else 2) // (shards if stage > 1 else 1),
        optimizer_bytes=0 if offloaded != "none" else state,
        activations_bytes=activation_bytes(config, layers),
        logits_bytes=LOGITS_BYTES,
    )


def activation_bytes(config: Config, layers: int) -> int:
    """Saved for backward by `layers` layers: a token of one layer keeps two norm inputs and outputs, q k v (also as
    rotated), the attention output, the dropout mask, and five times the MLP's inner width."""
    model, parallel = config.model, config.parallel
    element = 4 if PRECISIONS[config.precision.name].compute == "fp32" else 2
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    residual = hidden * element
    whole = 4 * residual + hidden  # replicated over tp unless sequence-parallel
    attention, inner = 7 * hidden * element, 5 * ffn * element
    if parallel.recompute == "selective":
        modules = recomputed_modules(parallel)
        attention = 4 * hidden * element if "core_attn" in modules else attention  # q, k, v and what comes out
        inner = 0 if "mlp" in modules else inner
    slices = parallel.tp if parallel.sequence_parallel else 1
    a_token = whole // slices + (attention + inner) // parallel.tp
    again = (parallel.recompute_layers or layers) if parallel.recompute == "full" else 0
    again = min(again, layers)
    kept = (layers - again) * a_token + again * residual // slices + (a_token if again else 0)
    tokens = config.batch.micro_batch_rows * config.data.seq_len // parallel.cp
    in_flight = parallel.pp  # 1F1B: as many micro-batches as stages wait for their backward
    return kept * tokens * in_flight
