"""The published numbers, pinned: shapes, parameter counts, and every phase of every size and objective."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from megatron_ettin.config.recipe import ORIGINAL_LOCAL_THETA, PHASES, recipe
from megatron_ettin.config.resolve import parse
from megatron_ettin.config.tables import (
    OBJECTIVES,
    SIZES,
    long_name,
    parameter_count,
    short_name,
    tensor_parallel_degrees,
)

SIZE_TABLE = {  # size: layers, hidden, ffn, heads, parameters, tensor-parallel degrees
    "17m": (7, 256, 384, 4, 16_913_600, [1, 2, 4]),
    "32m": (10, 384, 576, 6, 32_081_344, [1, 2, 3, 6]),
    "68m": (19, 512, 768, 8, 68_457_664, [1, 2, 4, 8]),
    "150m": (22, 768, 1152, 12, 149_655_232, [1, 2, 3, 4, 6, 12]),
    "400m": (28, 1024, 2624, 16, 395_881_664, [1, 2, 4, 8, 16]),
    "1b": (28, 1792, 3840, 28, 1_031_314_112, [1, 2, 4]),
}
PEAK = {"17m": 3e-3, "32m": 3e-3, "68m": 3e-3, "150m": 8e-4, "400m": 5e-4, "1b": 5e-4}
DECAY = {"17m": 3e-4, "32m": 3e-4, "68m": 3e-4, "150m": 1e-5, "400m": 1e-5, "1b": 5e-5}
WARMUP = {"17m": 4e9, "32m": 4e9, "68m": 3e9, "150m": 3e9, "400m": 2e9, "1b": 2e9}
BATCH_WARMUP = {"17m": 125e9, "32m": 100e9, "68m": 75e9, "150m": 50e9, "400m": 10e9, "1b": 3e9}
MICRO = {  # padded micro-batches by phase
    "pretrain": (144, 128, 96, 72, 48, 24),
    "extend": (24, 24, 18, 16, 6, 2),
    "decay": (12, 12, 8, 12, 2, 2),
    "cross": (12, 12, 8, 12, 4, 2),
}


@pytest.mark.parametrize("size", SIZE_TABLE)
def test_size_has_its_published_shape_and_parameter_count(size: str) -> None:
    layers, hidden, ffn, heads, parameters, degrees = SIZE_TABLE[size]
    shape = SIZES[size]
    assert (shape.num_layers, shape.hidden_size, shape.ffn_hidden_size, shape.num_attention_heads) == (
        layers,
        hidden,
        ffn,
        heads,
    )
    assert parameter_count(shape) == parameters
    assert tensor_parallel_degrees(shape) == degrees
    assert hidden // heads == 64


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("phase", PHASES)
def test_parse_every_combination_has_published_values(size: str, objective: str, phase: str) -> None:
    """Every combination has its published values, with the original's padded sequences."""
    config = parse(size, objective, phase, overrides=["data.batching=padded"])
    third = size == "1b"
    final = phase in ("decay", "cross")
    assert config.optim.lr == pytest.approx(PEAK[size] / 2 if final else PEAK[size])
    assert config.optim.weight_decay == DECAY[size]
    assert config.optim.weight_decay_reference_lr == pytest.approx(PEAK[size] / 2 if phase == "cross" else PEAK[size])
    assert (config.optim.beta1, config.optim.beta2, config.optim.eps) == (0.9, 0.98, 1e-6)
    assert config.batch.global_batch_rows == 4608
    assert config.batch.micro_batch_rows == MICRO[phase][list(SIZES).index(size)]
    assert config.batch.warmup_tokens == 0
    assert config.run.seed == (210 if phase == "cross" else 21)
    assert config.data.seq_len == (1024 if phase == "pretrain" else 7999)
    assert config.data.mlm_probability == (0 if objective == "clm" else 0.15 if final else 0.30)
    assert config.model.global_rope_theta == (10_000 if phase == "pretrain" else 160_000)
    assert config.model.attention_output_dropout == 0.1
    tokens = {"pretrain": 1.7e12, "extend": 83_333_000_000 if third else 250e9}.get(
        phase, 16_666_666_667 if third else 50e9
    )
    assert config.run.tokens == tokens
    every = {"cross": 3_333_333_333 if third else 10e9}.get(phase, 8.5e9)
    assert config.checkpoint.weights_every_tokens == every


@pytest.mark.parametrize("size", SIZES)
def test_recipe_schedules_match_the_published_phases(size: str) -> None:
    third = size == "1b"
    pretrain, extend, decay, cross = (recipe(size, "mlm", phase) for phase in PHASES)
    assert (pretrain.schedule.name, pretrain.schedule.warmup_tokens, pretrain.schedule.decay_tokens) == (
        "wsd",
        WARMUP[size],
        0,
    )
    assert (extend.schedule.name, extend.schedule.final_lr_fraction) == ("one_minus_sqrt", 0.5)
    assert extend.schedule.decay_tokens == extend.run.tokens
    assert (decay.schedule.name, decay.schedule.final_lr_fraction) == ("one_minus_sqrt", 0.04)
    assert decay.optim.lr * decay.schedule.final_lr_fraction == pytest.approx(0.02 * PEAK[size])
    assert cross.schedule.warmup_tokens == (1e9 if third else 3e9)
    assert cross.schedule.decay_tokens == (3_333_000_000 if third else 10e9)


def test_original_local_theta_matches_the_published_runs() -> None:
    assert ORIGINAL_LOCAL_THETA["extend", "mlm"]["17m"] == ORIGINAL_LOCAL_THETA["extend", "clm"]["17m"] == 10_000
    reset = [size for size, theta in ORIGINAL_LOCAL_THETA["decay", "clm"].items() if theta == 10_000]
    assert reset == ["17m", "32m", "68m", "400m"]
    assert set(ORIGINAL_LOCAL_THETA["decay", "mlm"].values()) == {160_000}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("phase", PHASES)
def test_recipe_encoder_and_decoder_share_model_optimizer_and_batch(size: str, phase: str) -> None:
    """Encoder and decoder have the same packed defaults, in pretrain of the published tokens a step (2.84M)."""
    encoder, decoder = recipe(size, "mlm", phase), recipe(size, "clm", phase)
    assert encoder.model == decoder.model
    assert encoder.optim == decoder.optim
    assert encoder.schedule == decoder.schedule
    assert encoder.batch == decoder.batch
    assert (encoder.data.seq_len, encoder.batch.global_batch_rows) == (
        (1024, 2816) if phase == "pretrain" else (8192, 1024)
    )


OTHER = ("model.num_layers=2", "model.hidden_size=64", "model.ffn_hidden_size=96", "model.vocab_size=2048")


@pytest.mark.parametrize("size", SIZES)
def test_short_name_of_published_shape_is_its_size(size):
    assert short_name(size, parse(size, "mlm", "pretrain").model) == size


@pytest.mark.parametrize("word", [*OTHER, "model.num_attention_heads=8"])
def test_short_name_of_another_shape_is_no_published_size(word):
    assert short_name("17m", parse("17m", "mlm", "pretrain", overrides=(word,)).model) not in SIZES


@pytest.mark.parametrize("as_file", [False, True])
def test_long_name_of_another_shape_says_parameters_shape_and_origin(as_file):
    model = parse("17m", "mlm", "pretrain", overrides=OTHER).model
    message = long_name("17m", asdict(model) if as_file else model)
    assert message == "207K parameters, 2 layers x 64, vocabulary 2,048 (from 17m)"


def test_long_name_of_published_shape_says_parameters_and_shape():
    assert long_name("17m", parse("17m", "clm", "decay").model) == "16.9M parameters, 7 layers x 256"


@pytest.mark.parametrize("model", [None, {}, {"num_layers": 2}, {"num_layers": "2"}, "tiny"])
def test_names_of_config_without_shape_are_the_size_alone(model):
    assert (short_name("17m", model), long_name("17m", model)) == ("17m", "")
