"""`ettin prepare` reads every kind of input, makes the same bytes with any number of workers, and continues after a
kill."""

from __future__ import annotations

import gzip
import json
import shutil
import signal
from pathlib import Path

import pytest
import zstandard

from megatron_ettin.data.dataset import open_dataset
from megatron_ettin.data.tokenizer import Tokenizer
from megatron_ettin.prepare import inputs
from megatron_ettin.prepare.inputs import cut_tasks, list_inputs
from megatron_ettin.prepare.readers.document import ReadOptions
from megatron_ettin.prepare.task import read_documents
from tests.checkpoint.durable import Watched, watched
from tests.data.corpora import ettin, files_of, prepare_here, words, write_jsonl
from tests.prepare.small_tasks import HOLD_VARIABLE, arguments_for, finish, forked, start, wait_for


def documents_in(path: Path) -> list[tuple[str, str]]:
    dataset = open_dataset(path)
    return list(dict.fromkeys(dataset.document_of(i)[:2] for i in range(dataset.num_chunks)))


def test_prepare_directory_of_folders_reads_text_and_compressed_jsonl(tmp_path: Path, tokenizer: Tokenizer) -> None:
    root = tmp_path / "in"
    (root / "sub").mkdir(parents=True)
    (root / ".hidden.txt").write_text("no")
    (root / "picture.png").write_bytes(b"\x89PNG\x00")
    (root / "b.txt").write_text("\ufeffSecond text.", encoding="utf-8")
    (root / "empty.txt").touch()
    (root / "sub" / "a.md").write_text("Third text.")
    line = b'{"text": "Packed \\ud800 text.", "id": 7}\n\n{"text": ""}\n'
    (root / "lines").mkdir()
    (root / "lines" / "a.jsonl.gz").write_bytes(gzip.compress(line) + gzip.compress(b'{"text": "More."}'))
    (root / "lines" / "c.jsonl.zst").write_bytes(zstandard.compress(line[:20]) + zstandard.compress(line[20:]))
    done = ettin("prepare", root, "--out", tmp_path / "out", "--workers", 2, "--json", "--seq-len", "1024,2048")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert documents_in(tmp_path / "out") == [
        ("in/b.txt", "in/b.txt"),
        ("in/lines/a.jsonl.gz", "7"),
        ("in/lines/a.jsonl.gz", "in/lines/a.jsonl.gz:4"),
        ("in/lines/c.jsonl.zst", "7"),
        ("in/sub/a.md", "in/sub/a.md"),
    ]
    assert (summary["documents"], summary["empty_documents"], len(summary["passed_over"])) == (5, 2, 2)
    assert [plan["seq_len"] for plan in summary["rows"]] == [1024, 2048]
    dataset = open_dataset(tmp_path / "out")
    assert tokenizer.decode(dataset.chunk(0).tolist()) == "[CLS] Second text.[SEP]"
    assert tokenizer.decode(dataset.chunk(1).tolist()) == "[CLS] Packed \ufffd text.[SEP]"
    assert [source.name for source in dataset.manifest.sources] == ["in"]


def test_read_documents_of_split_jsonl_yields_each_line_once_with_offset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lines.jsonl"
    texts = [words(1 + i % 7, i) for i in range(60)]
    lines = [json.dumps({"text": text}) + ("\n\n" if i % 9 == 0 else "\n") for i, text in enumerate(texts)]
    path.write_text("".join(lines))
    offsets = [sum(map(len, lines[:i])) for i in range(len(lines))]
    numbers = [1 + "".join(lines[:i]).count("\n") for i in range(len(lines))]
    whole = cut_tasks(list_inputs([str(path)], "auto")[0])[0].segments[0]
    actual = [(d.id, d.text) for d in read_documents(whole, ReadOptions())]
    assert actual == [(f"lines.jsonl:{number}", text) for number, text in zip(numbers, texts, strict=True)]
    for task_bytes in (1, 2, 7, 40, 41, 100, 1_000):
        monkeypatch.setattr(inputs, "TASK_BYTES", task_bytes)
        monkeypatch.setattr(inputs, "MOST_TASKS", 1 << 40)
        tasks = cut_tasks(list_inputs([str(path)], "auto")[0])
        segments = [segment for task in tasks for segment in task.segments]
        assert len(segments) > 1
        actual = [(d.id, d.text) for segment in segments for d in read_documents(segment, ReadOptions())]
        assert actual == [(f"lines.jsonl@{offset}", text) for offset, text in zip(offsets, texts, strict=True)]


def test_prepare_two_workers_resumed_after_kill_write_the_bytes_of_one(
    large: Path, large_dataset: dict[str, bytes], tmp_path: Path
) -> None:
    assert len([name for name in large_dataset if name.endswith(".bin") and "/" not in name]) >= 4
    work, arguments = tmp_path / ".tmp-out", arguments_for(large, tmp_path / "out", 2)
    running = start(arguments, tmp_path / "small_tasks.py", **{HOLD_VARIABLE: "3"})
    wait_for(lambda: len(list(work.glob("tasks/task_*.json"))) >= 1)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    assert not (tmp_path / "out").exists()  # no half-written dataset
    done_before = len(list(work.glob("tasks/task_*.json")))
    assert json.loads(finish(forked([*arguments, "--json"])))["tasks_resumed"] >= done_before
    assert files_of(tmp_path / "out") == large_dataset
    assert not work.exists()


def test_prepare_rerun_is_complete_and_changed_settings_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", 10)
    arguments = (source, "--out", tmp_path / "out", "--workers", 1)
    assert prepare_here(*arguments) == 0
    before = files_of(tmp_path / "out")
    capsys.readouterr()
    assert prepare_here(*arguments) == 0
    assert "already complete" in capsys.readouterr().out
    assert files_of(tmp_path / "out") == before
    assert prepare_here(*arguments, "--seq-len", 2048) == 0  # a packing index of another length may be added
    assert (tmp_path / "out" / "rows_2048").is_dir()
    assert prepare_here(*arguments, "--chunk-tokens", 512) == 2
    assert "other settings or inputs" in capsys.readouterr().err
    write_jsonl(tmp_path / "a.jsonl", 11)
    assert prepare_here(*arguments) == 2
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    assert prepare_here(source, "--out", tmp_path / "mine", "--workers", 1) == 2
    assert "is not a dataset" in capsys.readouterr().err


def test_prepare_path_used_twice_in_one_process_has_the_tokens_of_the_second_tokenizer(
    tmp_path: Path, tiny_tokenizer: Path
) -> None:
    (tmp_path / "a.txt").write_text(words(30, 1))
    arguments = (tmp_path / "a.txt", "--out", tmp_path / "out", "--workers", 1)
    assert prepare_here(*arguments) == 0
    shutil.rmtree(tmp_path / "out")
    assert prepare_here(*arguments, "--tokenizer", tiny_tokenizer) == 0
    dataset = open_dataset(tmp_path / "out")
    assert max(dataset.chunk(0)) < dataset.manifest.tokenizer.vocab_size


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    """Run `ettin prepare` and return the record of what it synced and renamed."""
    folder = tmp_path_factory.mktemp("published")
    source = write_jsonl(folder / "a.jsonl", 30)
    options = ("--chunk-tokens", 128, "--holdout", 0.3, "--seq-len", 128, "--workers", 1)
    with watched(folder) as seen:
        assert prepare_here(source, "--out", folder / "out", *options) == 0
    assert seen.renames[-1].target == folder / "out"
    return seen


def test_prepare_fsyncs_dataset_before_rename(published: Watched) -> None:
    """After a power failure, a dataset that has its final name must have all its content."""
    lost = {f"{rename.target.name}/{name}" for rename in published.renames for name in rename.unforced}
    assert {name for name in lost if "tokenizer" not in name} == set()
    assert published.folder not in published.unnamed


def test_prepare_forces_tokenizer_to_the_disk_before_dataset_has_its_name(published: Watched) -> None:
    assert published.renames[-1].unforced == []


def test_holdout_equal_texts_land_in_one_split(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": words(20, i % 50), "id": i}) + "\n" for i in range(200)))
    assert prepare_here(path, "--out", tmp_path / "out", "--holdout", 0.3, "--workers", 1) == 0
    sides = [{int(d) % 50 for _, d in documents_in(tmp_path / "out" / part)} for part in (".", "heldout")]
    assert sides[0] | sides[1] == set(range(50))
    assert not sides[0] & sides[1]
