"""What a model is called where it has the shape of its size, and where it has another one."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from megatron_ettin.config.resolve import parse
from megatron_ettin.config.tables import SIZES, long_name, short_name

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
    told = long_name("17m", asdict(model) if as_file else model)
    assert told == "207K parameters, 2 layers x 64, vocabulary 2,048 (from 17m)"


def test_long_name_of_published_shape_says_parameters_and_shape():
    assert long_name("17m", parse("17m", "clm", "decay").model) == "16.9M parameters, 7 layers x 256"


@pytest.mark.parametrize("model", [None, {}, {"num_layers": 2}, {"num_layers": "2"}, "tiny"])
def test_names_of_a_group_without_shape_are_the_size_alone(model):
    assert (short_name("17m", model), long_name("17m", model)) == ("17m", "")
