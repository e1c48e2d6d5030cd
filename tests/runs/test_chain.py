"""Joining phases to models, by the runs' records or by the order of the names."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_ettin.runs.chain import join_phases
from megatron_ettin.runs.directory import RunDirectory
from tests.report.synthetic import write_run


def written(folder: Path, *names: str) -> list[RunDirectory]:
    """Write runs `FOLDER/PHASE` of three steps."""
    return [RunDirectory(write_run(folder / name, phase=name.rpartition("/")[2], steps=3)) for name in names]


def joined(runs: list[RunDirectory], folder: Path, by_record: bool) -> list[list[str]]:
    chains = join_phases(runs, by_record)
    return [[run.path.relative_to(folder).as_posix() for run in chain.runs] for chain in chains]


def record_origin(run: RunDirectory, origin: Path) -> None:
    (run.path / "history.jsonl").write_text(json.dumps({"init_from": str(origin)}) + "\n")


def test_join_by_order_sorts_the_phases_of_a_shell_pattern(tmp_path: Path) -> None:
    runs = written(tmp_path, "decay", "extend", "pretrain")
    assert joined(runs, tmp_path, by_record=False) == [["pretrain", "extend", "decay"]]


def test_join_by_order_begins_another_chain_with_a_phase_again(tmp_path: Path) -> None:
    runs = written(tmp_path, "a/pretrain", "a/extend", "b/pretrain", "b/extend")
    assert joined(runs, tmp_path, by_record=False) == [["a/pretrain", "a/extend"], ["b/pretrain", "b/extend"]]
    assert [chain.name for chain in join_phases(runs, by_record=False)] == [
        "1: 17m mlm (pretrain)",
        "2: 17m mlm (pretrain)",
    ]


def test_join_by_record_follows_origins_across_folders(tmp_path: Path) -> None:
    runs = written(tmp_path, "a/pretrain", "b/pretrain", "c/extend")
    record_origin(runs[2], runs[1].path / "checkpoints" / "step_000000003")
    assert joined(runs, tmp_path, by_record=True) == [["a/pretrain"], ["b/pretrain", "c/extend"]]
    assert joined(runs, tmp_path, by_record=False) == [["a/pretrain"], ["b/pretrain", "c/extend"]]


def test_join_by_record_without_record_joins_phases_of_one_folder(tmp_path: Path) -> None:
    runs = written(tmp_path, "a/extend", "a/pretrain", "b/decay")
    assert joined(runs, tmp_path, by_record=True) == [["a/pretrain", "a/extend"], ["b/decay"]]


def test_join_by_record_run_of_unlisted_origin_starts_own_chain(tmp_path: Path) -> None:
    runs = written(tmp_path, "a/pretrain", "a/extend")
    record_origin(runs[1], tmp_path / "elsewhere")
    assert joined(runs, tmp_path, by_record=True) == [["a/pretrain"], ["a/extend"]]


def test_chain_axes_go_on_from_phase_to_phase(tmp_path: Path) -> None:
    (chain,) = join_phases(written(tmp_path, "pretrain", "extend"), by_record=True)
    first, second = chain.axes()
    assert first["steps"].tolist() == [1, 2, 3]
    assert second["steps"].tolist() == [4, 5, 6]
    assert second["tokens"][0] > first["tokens"][-1]
    assert chain.summary()["steps"] == 6
    assert chain.summary()["phases"] == ["pretrain", "extend"]
