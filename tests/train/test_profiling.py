"""`profile.steps` writes traces of the given steps and ranks and does not change the run."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import yaml

from megatron_ettin.cli.main import main
from tests.pool import Pool
from tests.train.runs import command, read, train

pytestmark = pytest.mark.ranks


def test_profile_steps_on_all_ranks_writes_traces_and_keeps_losses(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    plain = train(pool, 2, tmp_path / "plain", corpus, "mlm", ["run.steps=4"])
    overrides = ["run.steps=4", "profile.steps=2:4", "profile.ranks=all"]
    results = pool.run(2, command(tmp_path / "run", corpus, "mlm", overrides))
    assert [result.status for result in results] == [0, 0], results[0].output[-2000:]
    assert read(tmp_path / "run").column("loss") == plain.column("loss")
    files = sorted(path.name for path in (tmp_path / "run" / "profile").iterdir())
    stems = [f"steps_2-3_rank_0000{rank}" for rank in range(2)]
    assert files == [f"{stem}.{end}" for stem in stems for end in ("trace.json.gz", "txt")]
    trace = gzip.decompress((tmp_path / "run" / "profile" / files[0]).read_bytes())
    events = json.loads(trace)["traceEvents"]
    named = {event["name"] for event in events if event.get("cat") == "user_annotation"}
    assert {f"forward and backward of step {step}" for step in (2, 3)} | {"gradients", "update"} <= named
    text = (tmp_path / "run" / "profile" / files[1]).read_text()
    assert "aten::" in text
    assert 10 < len(text.splitlines()) <= 16
    assert any("profile of steps 2 to 3" in r.output and "aten::" in r.output for r in results)


@pytest.mark.full
def test_profile_run_ending_inside_range_writes_partial_trace(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    train(pool, 1, tmp_path, corpus, "clm", ["run.steps=2", "profile.steps=2:9"])
    assert (tmp_path / "profile" / "steps_2-2_rank_00000.trace.json.gz").stat().st_size > 1000
    train(pool, 1, tmp_path, corpus, "clm", ["run.steps=3", "profile.steps=2:9"])
    assert (tmp_path / "profile" / "steps_3-3_rank_00000.txt").exists()


def test_resume_from_config_of_earlier_version_is_accepted(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    """Resume from a config.yaml with a key that no longer exists and without a group that is new."""
    train(pool, 1, tmp_path, corpus, "clm", ["run.steps=1"])
    path = tmp_path / "config.yaml"
    groups = yaml.safe_load(path.read_text())
    del groups["profile"]
    groups["resilience"]["stop_on_nonfinite"] = True
    path.write_text(yaml.safe_dump(groups))
    assert train(pool, 1, tmp_path, corpus, "clm", ["run.steps=2"]).column("step") == [1, 2]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("profile.steps=0:2", "profile.steps: '0:2' is not [FIRST, END]"),
        ("profile.steps=5:5", "profile.steps: '5:5' is not [FIRST, END]"),
        ("profile.steps=1:900", "profile.steps: 1:900 are 899 steps; at most 50"),
        ("profile.ranks=first", "profile.ranks: 'first' is neither `all` nor a list of ranks"),
        ("profile.memory=true profile.steps=1", "profile.memory: needs a GPU, found none"),
    ],
)
def test_profile_invalid_setting_is_refused(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], word: str, message: str
) -> None:
    assert main(command(tmp_path, corpus, "mlm", ["run.steps=1", *word.split()])) == 2
    assert message in capsys.readouterr().err
