"""Run directories with older names and forms of keys resume without a changed science key."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_ettin.base.errors import UserError
from megatron_ettin.config.overrides import check_keys
from megatron_ettin.config.resolve import from_yaml, parse, to_yaml
from megatron_ettin.config.schema import science_keys
from megatron_ettin.runs import launches
from megatron_ettin.runs.directory import RunDirectory

RUNTIME = """runtime:
  device: auto
  deterministic: false
  attention: auto
  cuda_graph: false
  compile: never
"""
OLDER = {
    "weight_decay_reference_lr:": "max_lr:",
    "vpp:": "vp:",
    "  skip:\n  - - 24\n    - 32\n": "  skip: '24:32'\n",
    "  recompute_modules:\n  - core_attn\n": "  recompute_modules: core_attn\n",
    # these keys used to be the last ones of the group `run`, which comes before
    RUNTIME: RUNTIME.removeprefix("runtime:\n").replace("compile:", "fuse:"),
}


@pytest.fixture
def older(tmp_path: Path) -> Path:
    """Make a run directory with one checkpoint, as an earlier version wrote them."""
    text = to_yaml(parse("17m", "mlm", "pretrain", overrides=["data.skip=[[24, 32]]", "runtime.compile=never"]))
    for new, old in OLDER.items():
        assert new in text
        text = text.replace(new, old)
    checkpoint = tmp_path / "checkpoints" / "step_000000003"
    checkpoint.mkdir(parents=True)
    for folder in (tmp_path, checkpoint):
        (folder / "config.yaml").write_text(text)
    (tmp_path / "history.jsonl").write_text(json.dumps({"changes": ["optim.max_lr"]}) + "\n")
    (tmp_path / "rolled_back.json").write_text(json.dumps([{"to": 3, "skip": "24:32"}]))
    return tmp_path


def test_science_keys_of_an_older_run_are_those_of_today(older: Path) -> None:
    config = parse("17m", "mlm", "pretrain", overrides=["data.skip=[[24, 32]]"])
    assert RunDirectory(older).science == science_keys(config)


def test_checkpoint_of_an_older_run_is_accepted(older: Path) -> None:
    config = parse("17m", "mlm", "pretrain", overrides=["data.skip=24:32"])
    launches.check_checkpoint(older / "checkpoints" / "step_000000003", older, config, ())


def test_older_names_of_allowed_changes_are_those_of_today(older: Path) -> None:
    assert RunDirectory(older).changes == ["optim.weight_decay_reference_lr"]


def test_roll_back_recorded_as_text_is_not_repeated(older: Path) -> None:
    assert not launches.roll_back(older, 3, [[24, 32]])


def test_runtime_keys_of_an_older_run_are_read_from_its_run_group(older: Path) -> None:
    config = from_yaml(older / "config.yaml")
    assert config.runtime.compile == "never"
    assert config.run.steps is None


def test_runtime_key_by_both_names_is_refused() -> None:
    with pytest.raises(UserError, match=r"runtime.device: run.device is its older name, and both are set"):
        check_keys({"run": {"device": "cpu"}, "runtime": {"device": "cpu"}})


def test_science_keys_of_an_older_hybrid_run_are_those_of_today(tmp_path: Path) -> None:
    config = parse("17m", "hybrid", "pretrain", overrides=["data.clm_fraction=[[0, 0.8], [1500, 0.3]]"])
    today = "  clm_fraction:\n  - - 0\n    - 0.8\n  - - 1500\n    - 0.3\n"
    text = to_yaml(config)
    assert today in text
    (tmp_path / "config.yaml").write_text(text.replace(today, "  clm_fraction: 0:0.8,1500:0.3\n"))
    assert RunDirectory(tmp_path).science == science_keys(config)


def test_removed_key_is_ignored_in_stored_config_and_refused_as_override(older: Path) -> None:
    path = older / "config.yaml"
    path.write_text(path.read_text().replace("resilience:\n", "resilience:\n  in_process_restarts: 3\n"))
    assert from_yaml(path).resilience.save_on_signal
    with pytest.raises(UserError, match=r"resilience.in_process_restarts: this key is gone .*; remove it"):
        parse("17m", "mlm", "pretrain", overrides=["resilience.in_process_restarts=3"])
