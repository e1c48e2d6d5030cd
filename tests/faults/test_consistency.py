"""Ranks that differ in code, weights or computed bits are named. tests/launch/test_nodes.py tests it on real nodes."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ettin.base.versions import clock_warnings, code_hash, first_difference, library_versions
from megatron_ettin.checkpoint.directory import latest
from tests.faults.test_skipped_steps import NERVOUS, bad
from tests.pool import Pool
from tests.train.runs import command, read

HOSTS = ["n1", "n1", "n2", "n2"]


def test_rank_consistency_one_differing_rank_is_named() -> None:
    facts = [{"code": "a", "data": "x"} for _ in HOSTS]
    assert first_difference(HOSTS, facts) is None
    facts[3] = {"code": "a", "data": "y"}
    assert first_difference(HOSTS, facts) == "the ranks differ in data: rank 3 on n2: y; the other 3 have x"
    facts[2] = {"code": "b", "data": "x"}
    difference = first_difference(HOSTS, facts)
    assert difference is not None
    assert difference.startswith("the ranks differ in code: rank 2 on n2: b;")


def test_rank_consistency_many_differing_ranks_lists_three_and_counts_rest() -> None:
    facts = [{"code": str(min(rank, 5))} for rank in range(12)]
    difference = first_difference(["n"] * 12, facts)
    assert difference is not None
    assert "rank 0 on n: 0, rank 1 on n: 1, rank 2 on n: 2 and 2 more; the other 7 have 5" in difference


def test_clock_skew_above_tolerance_is_warned_with_host_and_seconds() -> None:
    assert clock_warnings(HOSTS, [100.0, 100.1, 101.0, 102.0]) == []
    late = clock_warnings(["n1", "n1", "n2", "n3"], [100.0, 100.0, 40.0, 100.1])
    assert late == ["warning: the clock of n2 is 60 s behind the others"]
    assert clock_warnings(["n1", "n2", "n3"], [0.0, 7.4, 0.0]) == [
        "warning: the clock of n2 is 7 s ahead of the others"
    ]


def test_code_hash_and_versions_have_expected_form() -> None:
    assert len(code_hash()) == 12
    assert "megatron-core 0." in library_versions()


def test_train_edited_code_on_one_rank_is_refused_on_all_ranks(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    """Every rank exits with 2, and the run directory can be used afterwards."""
    overrides = command(tmp_path / "run", corpus, "mlm", ["run.steps=1"])
    results = pool.run(2, overrides, "edited_code_on_rank_1")
    assert [result.status for result in results] == [2, 2]
    assert "the ranks differ in code of megatron_ettin: rank 1 on " in results[0].output
    assert "(edited); the other 1 have " in results[0].output
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert [result.status for result in pool.run(2, overrides)] == [0, 0]


@pytest.mark.ranks
def test_replica_check_names_rank_with_flipped_weight(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    overrides = ["run.steps=3", "resilience.check_replicas_every=1", "parallel.tp=2", "checkpoint.every_steps=1"]
    sound = command(tmp_path / "sound", corpus, "mlm", [*overrides, "run.steps=2"])
    assert [r.status for r in pool.run(4, sound)] == [0] * 4
    results = pool.run(4, command(tmp_path / "flipped", corpus, "mlm", overrides), "flipped_weight_on_rank_1")
    assert [result.status for result in results] == [1] * 4
    message = (
        "step 2: rank 1 on {} holds other bits of transformer.final_layernorm.weight than 3 others have, as rank 0"
    )
    host = results[1].output.rpartition("rank 1 on ")[2].split()[0]
    assert message.format(host) in results[1].output
    assert latest(tmp_path / "flipped").name == "step_000000001"  # type: ignore[union-attr]


@pytest.mark.ranks
def test_replica_check_compares_both_copies_of_tied_embedding(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    """First and last stage hold a copy each, and update it with a clip that each computes."""
    overrides = ["run.steps=3", "resilience.check_replicas_every=1", "parallel.pp=2"]
    sound = command(tmp_path / "sound", corpus, "mlm", overrides)
    assert [r.status for r in pool.run(2, sound)] == [0, 0]
    results = pool.run(2, command(tmp_path / "flipped", corpus, "mlm", overrides), "flipped_tied_weight_on_last_stage")
    assert [result.status for result in results] == [1, 1]
    assert "other bits of embedding.word_embeddings.weight than" in results[0].output


@pytest.mark.ranks
def test_replay_check_names_rank_with_irreproducible_output(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    """Healthy ranks reproduce a spike bit for bit; a rank that does not is named."""
    overrides = ["run.steps=7", "resilience.recheck=true", "parallel.pp=2", *NERVOUS]
    results = pool.run(2, command(tmp_path / "sound", corpus, "mlm", overrides))
    assert [result.status for result in results] == [0, 0]
    assert any("all ranks have the same bits" in result.output for result in results)
    assert bad(read(tmp_path / "sound"))
    results = pool.run(2, command(tmp_path / "unsound", corpus, "mlm", overrides), "unsound_layer_on_rank_1")
    assert [result.status for result in results] == [1, 1]
    assert "the output of layer 3 for micro-batch 0 has other bits the second time on rank 1 on " in results[1].output
    assert "another rank failed: " in results[0].output
