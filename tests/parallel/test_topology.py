"""Coordinates of ranks and pipeline layouts."""

from __future__ import annotations

import pytest

from megatron_ettin.config.resolve import parse
from megatron_ettin.parallel.topology import Topology


def test_topology_coords_are_unique_per_rank() -> None:
    config = parse("1b", "mlm", "pretrain", overrides=["parallel.tp=2", "parallel.pp=4", "batch.micro_batch_rows=8"])
    topology = Topology.of(config, 32)
    assert topology.dp == 4
    coords = {tuple(topology.coords(rank).items()) for rank in range(32)}
    assert len(coords) == 32
    assert topology.coords(1) == {"tp": 1, "cp": 0, "dp": 0, "pp": 0}


@pytest.mark.parametrize(
    ("words", "layout"),
    [
        ("parallel.pp=1", None),
        ("parallel.pp=2", "Et*6|tL"),
        ("parallel.pp=2 parallel.vpp=2", "Et*2|t*2|t*2|tL"),
        ("parallel.pp=7", "Et|t|t|t|t|t|tL"),
    ],
)
def test_topology_pipeline_layout_matches_pp_and_vpp(words: str, layout: str | None) -> None:
    config = parse(
        "17m", "mlm", "pretrain", overrides=[*words.split(), "batch.micro_batch_rows=8", "batch.global_batch_rows=112"]
    )
    assert Topology.of(config, config.parallel.pp).pipeline_layout == layout
