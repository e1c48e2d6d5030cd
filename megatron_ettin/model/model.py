"""Define the encoder or decoder model, on core's LanguageModule and TransformerBlock.

embedding -> norm -> layers -> final norm -> [at labelled positions only] dense, GELU, norm -> tied output with a
vocabulary bias. Encoder and decoder differ only in the attention mask that the configuration sets.
"""

from __future__ import annotations

import copy

import torch
from megatron.core import tensor_parallel
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, VocabParallelEmbedding
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from torch.nn import functional

from megatron_ettin.model.config import EttinTransformerConfig
from megatron_ettin.model.layer import BiasFreeLayerNorm, block_spec
from megatron_ettin.model.loss import LossOptions, LossOutput, linear_cross_entropy
from megatron_ettin.model.packed import PackedRows


class Embedding(MegatronModule):
    """Token embedding and its norm. The name `word_embeddings` is fixed by core's tying code."""

    def __init__(self, config: EttinTransformerConfig, vocab_size: int, groups: ProcessGroupCollection) -> None:
        super().__init__(config=config)
        self.word_embeddings = VocabParallelEmbedding(
            vocab_size,
            config.hidden_size,
            init_method=config.embedding_init_method,
            reduce_scatter_embeddings=config.sequence_parallel,
            config=config,
            tp_group=groups.tp,
        )
        self.norm = BiasFreeLayerNorm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return hidden states [tokens (/ tp under sequence parallelism), 1, hidden] of input_ids [rows, seq_len]."""
        x = self.word_embeddings(input_ids.reshape(1, -1))
        # under sequence parallelism core has transposed it before scattering
        if not self.config.sequence_parallel:
            x = x.transpose(0, 1).contiguous()
        normed: torch.Tensor = self.norm(x)
        return normed


class PredictionHead(MegatronModule):
    """dense -> GELU -> norm, replicated over tensor-parallel ranks.

    All ranks run it on the same gathered positions, so its gradients are equal everywhere and need no reduction.
    """

    def __init__(self, config: EttinTransformerConfig) -> None:
        super().__init__(config=config)
        self.dense = torch.nn.Linear(config.hidden_size, config.hidden_size, bias=False, dtype=config.params_dtype)
        self.norm = BiasFreeLayerNorm(config, config.hidden_size, config.layernorm_epsilon, sequence_parallel=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [n, hidden] for x [n, hidden]."""
        normed: torch.Tensor = self.norm(functional.gelu(self.dense(x)))
        return normed


# Parameters with one row per vocabulary entry, padded for tensor parallelism. Their attribute `real_rows` is the number
# of rows that are trained, which the optimizer's statistics over a whole tensor need.
VOCABULARY = ("embedding.word_embeddings.", "output_layer.")


def padded_vocabulary(vocab_size: int, tp: int) -> int:
    """Return the number of embedding rows: the vocabulary size rounded up to a multiple of `tp`."""
    return -(-vocab_size // tp) * tp


class EttinModel(LanguageModule):
    """Encoder or decoder, or one pipeline stage of it.

    A stage with `pre_process` has the embedding, one with `post_process` the final norm, the head and the loss.
    """

    def __init__(
        self,
        config: EttinTransformerConfig,
        groups: ProcessGroupCollection,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(config=config, pg_collection=groups)
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.share_embeddings_and_output_weights = True
        # core's schedules read this
        self.model_type = ModelType.encoder_or_decoder
        self.pp_rank = groups.pp.rank()
        vocabulary = padded_vocabulary(config.vocab_size, config.tensor_model_parallel_size)
        if pre_process:
            self.embedding = Embedding(config, vocabulary, groups)
        self.transformer = TransformerBlock(
            config,
            block_spec(config, vp_stage, self.pp_rank),
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
            pg_collection=groups,
        )
        if post_process:
            self.head = PredictionHead(config)
            self.output_layer = self._output_layer(vocabulary, groups)
        if pre_process or post_process:
            self.setup_embeddings_and_output_layer()
        for name, parameter in self.named_parameters():
            if name.startswith(VOCABULARY):
                parameter.real_rows = config.vocab_size

    def _output_layer(self, vocabulary: int, groups: ProcessGroupCollection) -> ColumnParallelLinear:
        """Build the vocabulary bias and, on a last stage without embedding, the copy of the tied weight."""
        # dataclasses.replace would run core's checks on derived values again
        config = copy.copy(self.config)
        # its input is gathered already, and the loss computes its weight's gradient
        config.sequence_parallel = config.gradient_accumulation_fusion = False
        return ColumnParallelLinear(
            config.hidden_size,
            vocabulary,
            config=config,
            init_method=config.init_method,
            bias=True,
            skip_bias_add=False,
            gather_output=False,
            skip_weight_param_allocation=self.pre_process,
            tp_group=groups.tp,
        )

    def set_input_tensor(self, tensor: torch.Tensor | list[torch.Tensor]) -> None:
        """Take the previous stage's hidden states from core's schedule."""
        self.transformer.set_input_tensor(tensor[0] if isinstance(tensor, list) else tensor)

    def forward(
        self,
        input_ids: torch.Tensor,
        packed: PackedRows,
        labels: torch.Tensor | None = None,
        label_positions: torch.Tensor | None = None,
        loss_factor: float = 1.0,
    ) -> torch.Tensor | LossOutput:
        """Run this stage on a micro-batch.

        Args:
            input_ids: token ids [rows, seq_len].
            packed: boundaries and positions of the micro-batch.
            labels: labels [n].
            label_positions: their flat positions [n] in the micro-batch.
            loss_factor: the number that the sum of losses will be multiplied by before backward.

        Returns:
            Hidden states [tokens, 1, hidden] on a stage without the head; on the last stage a `LossOutput` if
            labels are given, else logits [tokens, vocabulary].
        """
        embedded = self.embedding(input_ids) if self.pre_process else None
        x: torch.Tensor = self.transformer(hidden_states=embedded, attention_mask=None, packed_seq_params=packed)
        if not self.post_process:
            return x
        if self.config.sequence_parallel:
            # from here on every rank works on the same rows: backward must split the gradient, not sum it
            x = tensor_parallel.gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=False)
        x = x.squeeze(1)
        weight = self.shared_embedding_or_output_weight()
        if labels is None:
            logits, _ = self.output_layer(self.head(x).unsqueeze(1), weight=weight)
            gathered: torch.Tensor = tensor_parallel.gather_from_tensor_model_parallel_region(logits)
            return gathered.squeeze(1)[:, : self.config.vocab_size]
        assert label_positions is not None
        group = self.pg_collection.tp
        first = group.rank() * weight.shape[0]
        return linear_cross_entropy(
            self.head(x[label_positions]),
            weight,
            self.output_layer.bias,
            labels,
            LossOptions(
                first=first,
                valid=max(0, min(weight.shape[0], self.config.vocab_size - first)),
                group=group if group.size() > 1 else None,
                padded=packed.layer_keys is not None,
                factor=loss_factor,
            ),
        )
