"""Silent data corruption: a replayed step and weights compared across replicas name the rank that is unsound."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ettin.checkpoint.directory import latest
from tests.faults.test_skipped_steps import NERVOUS, bad
from tests.pool import Pool
from tests.train.runs import command, read

pytestmark = pytest.mark.ranks


def test_replay_check_names_rank_with_irreproducible_output(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    """Healthy ranks reproduce a spike bit for bit; a rank that does not is named."""
    words = ["run.steps=7", "resilience.recheck=true", "parallel.pp=2", *NERVOUS]
    results = pool.run(2, command(tmp_path / "sound", corpus, "mlm", words))
    assert [result.status for result in results] == [0, 0]
    assert any("all ranks have the same bits" in result.output for result in results)
    assert bad(read(tmp_path / "sound"))
    results = pool.run(2, command(tmp_path / "unsound", corpus, "mlm", words), "unsound_layer_on_rank_1")
    assert [result.status for result in results] == [1, 1]
    assert "the output of layer 3 for micro-batch 0 has other bits the second time on rank 1 on " in results[1].output
    assert "another rank failed: " in results[0].output


def test_replica_check_names_rank_with_flipped_weight(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    words = ["run.steps=3", "resilience.check_replicas_every=1", "parallel.tp=2", "checkpoint.every_steps=1"]
    sound = command(tmp_path / "sound", corpus, "mlm", [*words, "run.steps=2"])
    assert [r.status for r in pool.run(4, sound)] == [0] * 4
    results = pool.run(4, command(tmp_path / "flipped", corpus, "mlm", words), "flipped_weight_on_rank_1")
    assert [result.status for result in results] == [1] * 4
    said = "step 2: rank 1 on {} holds other bits of transformer.final_layernorm.weight than 3 others have, as rank 0"
    host = results[1].output.rpartition("rank 1 on ")[2].split()[0]
    assert said.format(host) in results[1].output
    assert latest(tmp_path / "flipped").name == "step_000000001"  # type: ignore[union-attr]


def test_replica_check_compares_both_copies_of_tied_embedding(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    """First and last stage hold a copy each, and update it with a clip that each computes."""
    words = ["run.steps=3", "resilience.check_replicas_every=1", "parallel.pp=2"]
    sound = command(tmp_path / "sound", corpus, "mlm", words)
    assert [r.status for r in pool.run(2, sound)] == [0, 0]
    results = pool.run(2, command(tmp_path / "flipped", corpus, "mlm", words), "flipped_tied_weight_on_last_stage")
    assert [result.status for result in results] == [1, 1]
    assert "other bits of embedding.word_embeddings.weight than" in results[0].output
