"""Silent data corruption: a replayed step names the rank that is unsound."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.test_skipped_steps import NERVOUS, bad
from tests.pool import Pool
from tests.train.runs import command, read

pytestmark = pytest.mark.ranks


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
