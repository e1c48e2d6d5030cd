"""What each key is declared with: docs, default, type and range."""

from __future__ import annotations

import dataclasses

import pytest
from omegaconf import OmegaConf

from megatron_ettin.base.errors import UserError
from megatron_ettin.config.checks import check
from megatron_ettin.config.keys import Key
from megatron_ettin.config.recipe import recipe
from megatron_ettin.config.schema import CONDITIONS, GUARD_KEYS, all_keys, key_types


@pytest.mark.parametrize("name", key_types())
def test_key_is_documented_and_its_default_is_allowed(name: str) -> None:
    key, value = all_keys()[name], recipe("17m", "mlm", "pretrain").value(name)
    assert key.doc.endswith((".", "..."))
    assert not (key.is_bounded and key.choices)
    if key.is_bounded and value is not None:
        assert key.allows(value)
    if key.choices:
        assert value in key.choices


def test_keys_are_typed_by_omegaconf() -> None:
    tree = OmegaConf.structured(recipe("17m", "mlm", "pretrain"))
    assert {f"{group}.{name}" for group in tree for name in tree[group]} == set(all_keys())


@pytest.mark.parametrize(
    ("key", "allowed", "refused", "text"),
    [
        (Key(doc="", above=0), [1e-9], [0, -1, float("nan"), float("inf")], "above 0"),
        (Key(doc="", at_least=0, below=1), [0, 0.5], [1, -0.1], "at least 0 and below 1"),
        (Key(doc="", at_least=0, at_most=1), [0, 1], [1.1], "at least 0 and at most 1"),
        (Key(doc="", at_least=0, zero="none", infinite=True), [0, float("inf")], [-1], "0 (none) or above"),
        (Key(doc="", at_least=1, below=1e7), [1], [1e7], "at least 1 and below 10,000,000"),
    ],
)
def test_key_range_allows_numbers_within_its_bounds(
    key: Key, allowed: list[float], refused: list[float], text: str
) -> None:
    assert [value for value in allowed if not key.allows(value)] == []
    assert [value for value in refused if key.allows(value)] == []
    assert key.range == text


def test_science_conditions_belong_to_keys_that_need_one() -> None:
    assert {name for name, key in all_keys().items() if isinstance(key.science, str)} == set(CONDITIONS)
    assert [name.removeprefix("resilience.") for name in GUARD_KEYS] == [
        *("on_nonfinite", "on_spike", "spike_sigmas", "spike_window", "spike_ratio")
    ]


def test_with_keys_replaces_values_of_several_groups() -> None:
    base = recipe("17m", "mlm", "pretrain")
    changed = base.with_keys({"run.steps": 5, "run.seed": 3, "parallel.tp": 2})
    assert [changed.value(name) for name in ("run.steps", "run.seed", "parallel.tp")] == [5, 3, 2]
    assert dataclasses.replace(changed, run=base.run, parallel=base.parallel) == base


def test_check_of_a_number_out_of_range_names_key_value_and_range() -> None:
    with pytest.raises(UserError, match=r"^checkpoint\.keep: -1 is not allowed; it must be 0 \(keep all\) or above$"):
        check(recipe("17m", "mlm", "pretrain").with_keys({"checkpoint.keep": -1}))
