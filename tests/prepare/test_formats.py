"""Parquet files, saved datasets, other file systems: the same documents give the same dataset in every format."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from pathlib import Path

import datasets
import fsspec
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megatron_ettin.cli.main import main
from megatron_ettin.cli.prepare import FORMATS
from megatron_ettin.data.tokenizer import Tokenizer
from megatron_ettin.prepare import inputs
from megatron_ettin.prepare.inputs import cut_tasks, list_inputs
from megatron_ettin.prepare.readers.document import ReadOptions
from megatron_ettin.prepare.task import read_documents
from tests.data.corpora import ettin, files_of, prepare_here, words
from tests.prepare.held import prepared, refusal

MDS_TOKENS = Path(__file__).parents[1] / "fixtures" / "mds" / "tokens"
TEXTS = [words(1 + 7 * i % 40, i) for i in range(60)]
IDS = [f"doc-{i}" if i % 3 else None for i in range(60)]


def table(arrow_type: pyarrow.DataType | None = None) -> pyarrow.Table:
    text = pyarrow.array(TEXTS, pyarrow.string())
    if arrow_type is not None:
        text = text.dictionary_encode() if pyarrow.types.is_dictionary(arrow_type) else text.cast(arrow_type)
    return pyarrow.table({"score": [0.5] * len(TEXTS), "text": text, "id": IDS})


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """Return the token ids of TEXTS, prepared from JSON lines."""
    folder = tmp_path_factory.mktemp("lines")
    (folder / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return [ids for _, _, ids in prepared(folder, folder / "in.jsonl")]


KINDS = {
    "string": pyarrow.string(),
    "large": pyarrow.large_string(),
    "dictionary": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
}


@pytest.mark.parametrize(
    ("arrow_type", "compression"),
    [("string", "zstd"), ("string", "none"), ("large", "snappy"), ("dictionary", "none")],
)
def test_prepare_parquet_of_any_string_type_and_codec_matches_jsonl(
    arrow_type: str, compression: str, tmp_path: Path, expected: list[list[int]]
) -> None:
    path = tmp_path / "in.parquet"
    pyarrow.parquet.write_table(table(KINDS[arrow_type]), path, row_group_size=7, compression=compression)
    actual = prepared(tmp_path, path)
    assert [ids for _, _, ids in actual] == expected
    assert [name for _, name, _ in actual] == [name or f"in.parquet#{i}" for i, name in enumerate(IDS)]


def small_tasks(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(inputs, "TASK_BYTES", size)
    monkeypatch.setattr(inputs, "MOST_TASKS", 1 << 40)


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_cut_tasks_file_split_into_ranges_yields_every_document_once(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"in.{suffix}"
    if suffix == "parquet":
        pyarrow.parquet.write_table(table(), path, row_group_size=7)
    else:
        with pyarrow.ipc.new_stream(str(path), table().schema) as writer:
            writer.write_table(table(), max_chunksize=7)
    for size in (1, 500, 1_000, 10_000):
        small_tasks(monkeypatch, size)
        tasks = cut_tasks(list_inputs([str(path)], "auto")[0])
        actual = [d for task in tasks for segment in task.segments for d in read_documents(segment, ReadOptions())]
        assert [document.text for document in actual] == TEXTS
        assert [document.id for document in actual] == [name or f"in.{suffix}#{i}" for i, name in enumerate(IDS)]
        assert len(tasks) > 3 or size == 10_000


def test_prepare_saved_datasets_and_splits_match_jsonl(tmp_path: Path, expected: list[list[int]]) -> None:
    whole = datasets.Dataset.from_dict({"text": TEXTS, "id": IDS})
    whole.save_to_disk(str(tmp_path / "saved"), num_shards=3)
    actual = prepared(tmp_path, tmp_path / "saved")
    assert [ids for _, _, ids in actual] == expected
    assert sorted({source for source, _, _ in actual}) == [f"saved/data-{i:05d}-of-00003.arrow" for i in range(3)]
    state = tmp_path / "saved" / "state.json"
    content = json.loads(state.read_text())
    content["_data_files"].reverse()  # shards come in the order of state.json, not of their names
    state.write_text(json.dumps(content))
    turned = prepared(tmp_path, tmp_path / "saved")
    assert [ids for _, _, ids in turned] == expected[40:] + expected[20:40] + expected[:20]

    splits = datasets.DatasetDict({"train": whole.select(range(50)), "test": whole.select(range(50, 60))})
    splits.save_to_disk(str(tmp_path / "above" / "splits"))
    assert [ids for _, _, ids in prepared(tmp_path, tmp_path / "above" / "splits")] == expected
    assert [ids for _, _, ids in prepared(tmp_path, tmp_path / "above" / "splits" / "test")] == expected[50:]
    above = prepared(tmp_path, tmp_path / "above", options=("--format", "datasets"))
    assert len(above) == 60
    assert above[0][0] == "above/splits/train/data-00000-of-00001.arrow"


def test_prepare_arrow_stream_and_file_match_jsonl(tmp_path: Path, expected: list[list[int]]) -> None:
    with pyarrow.ipc.new_stream(str(tmp_path / "stream.arrow"), table().schema) as writer:
        writer.write_table(table(), max_chunksize=9)
    with pyarrow.ipc.new_file(str(tmp_path / "file.arrow"), table().schema) as writer:
        writer.write_table(table(), max_chunksize=9)
    for name in ("stream", "file"):
        assert [ids for _, _, ids in prepared(tmp_path, tmp_path / f"{name}.arrow")] == expected


def test_prepare_saved_dataset_with_indices_or_absent_file_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "saved"
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(str(saved))
    state = json.loads((saved / "state.json").read_text())
    (saved / "state.json").write_text(json.dumps({**state, "_indices_files": [{"filename": "indices.arrow"}]}))
    assert "flatten it first: datasets.load_from_disk(DIR).flatten_indices()" in refusal(capsys, tmp_path, saved)
    (saved / "state.json").write_text(json.dumps({**state, "_data_files": [{"filename": "absent.arrow"}]}))
    assert "state.json: names the data file 'absent.arrow', which is not there" in refusal(capsys, tmp_path, saved)


def test_prepare_damaged_parquet_or_arrow_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parquet, arrow = tmp_path / "in.parquet", tmp_path / "in.arrow"
    pyarrow.parquet.write_table(table(), parquet, row_group_size=20, compression="zstd")
    with pyarrow.ipc.new_stream(str(arrow), table().schema) as writer:
        writer.write_table(table(), max_chunksize=20)
    whole, stream = parquet.read_bytes(), arrow.read_bytes()
    parquet.write_bytes(whole[: len(whole) // 2])
    message = refusal(capsys, tmp_path, parquet)
    assert f"in.parquet: not a parquet file, or truncated: {len(whole) // 2} bytes" in message
    parquet.write_bytes(whole[:2_000] + bytes(100) + whole[2_100:])
    assert "in.parquet#" in refusal(capsys, tmp_path, parquet)
    parquet.write_bytes(b"")
    assert "in.parquet: " in refusal(capsys, tmp_path, parquet)
    arrow.write_bytes(stream[: len(stream) // 2])
    message = refusal(capsys, tmp_path, arrow)
    assert f"in.arrow: does not end as an Arrow stream does, at byte {len(stream) // 2}" in message
    arrow.write_bytes(stream[: len(stream) // 2] + stream[-8:])
    assert "in.arrow#20: broken Arrow data, or truncated" in refusal(capsys, tmp_path, arrow)


def test_prepare_parquet_missing_or_unfit_column_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "in.parquet"
    pyarrow.parquet.write_table(table().rename_columns(["score", "texts", "id"]), path)
    message = refusal(capsys, tmp_path, path)
    assert "in.parquet: no text column 'text' (did you mean 'texts'?) and no token column 'input_ids'" in message
    assert "columns found: score (double), texts (string), id (string)" in message
    message = refusal(capsys, tmp_path, path, "--text-key", "score")
    assert "in.parquet: column 'score' is double, not a string" in message
    message = refusal(capsys, tmp_path, path, "--tokens-key", "texts")
    assert "in.parquet: column 'texts' is string, not a list of integers" in message
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b", None]}), path)
    assert "in.parquet#2: 'text' is null, not a string" in refusal(capsys, tmp_path, path)
    raw = pyarrow.array([b"good", b"bad\xff"], pyarrow.binary())
    pyarrow.parquet.write_table(pyarrow.table({"text": raw.view(pyarrow.string())}), path)
    assert "in.parquet#1: 'text' is not UTF-8, byte 3 of it" in refusal(capsys, tmp_path, path)


def test_prepare_truncated_zstd_frame_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frame = zstandard.compress(json.dumps({"text": words(500, 1)}).encode())
    path = tmp_path / "in.jsonl.zst"
    path.write_bytes(frame + frame[: len(frame) // 2])
    assert "in.jsonl.zst: zstd data ends in the middle, at byte" in refusal(capsys, tmp_path, path)


def test_prepare_memory_filesystem_matches_local_and_refuses_bad_files(
    tmp_path: Path, expected: list[list[int]], capsys: pytest.CaptureFixture[str]
) -> None:
    memory = fsspec.filesystem("memory")
    root = f"/{tmp_path.name}"
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    memory.pipe(f"{root}/lines/a.jsonl", lines.encode())
    memory.pipe(f"{root}/lines/sub/b.jsonl.zst", zstandard.compress(lines.encode()))
    memory.pipe(f"{root}/lines/.hidden.jsonl", b"no")
    with memory.open(f"{root}/in.parquet", "wb") as stream:
        pyarrow.parquet.write_table(table(), stream, row_group_size=9)
    saved = tmp_path / "saved"
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(str(saved), num_shards=2)
    memory.put(str(saved), f"{root}/saved", recursive=True)
    actual = prepared(tmp_path, f"memory:/{root}/lines", f"memory:/{root}/in.parquet", f"memory:/{root}/saved/")
    assert [ids for _, _, ids in actual] == expected * 4
    assert list(dict.fromkeys(source for source, _, _ in actual)) == [
        "lines/a.jsonl",
        "lines/sub/b.jsonl.zst",
        "in.parquet",
        "saved/data-00000-of-00002.arrow",
        "saved/data-00001-of-00002.arrow",
    ]
    assert "no such file or directory" in refusal(capsys, tmp_path, f"memory:/{root}/absent.jsonl")
    memory.pipe(f"{root}/half.parquet", b"PAR1 and no more")
    assert "half.parquet: not a parquet file" in refusal(capsys, tmp_path, f"memory:/{root}/half.parquet")
    memory.rm(root, recursive=True)


def test_prepare_remote_file_in_ranges_matches_whole_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: list[list[int]]
) -> None:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    memory = fsspec.filesystem("memory")
    memory.pipe(f"/{tmp_path.name}/a.jsonl", lines.encode())
    small_tasks(monkeypatch, 1_000)
    monkeypatch.setattr(inputs, "SMALLEST_TASK_BYTES", 1_000)
    actual = prepared(tmp_path, f"memory://{tmp_path.name}/a.jsonl")
    assert [ids for _, _, ids in actual] == expected
    starts = [0, *itertools.accumulate(len(line) + 1 for line in lines.splitlines())]
    # byte offsets instead of line numbers, because lines of a remote file are not counted
    assert [name for _, name, _ in actual] == [f"a.jsonl@{start}" for start in starts[:-1]]
    assert len(list((tmp_path / "out0").glob("*.bin"))) > 3
    memory.rm(f"/{tmp_path.name}", recursive=True)


def test_prepare_remote_read_error_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe(f"/{tmp_path.name}/a.jsonl", b'{"text": "a"}')

    def fail(*_: object) -> bytes:
        raise RuntimeError("Connection reset by peer.\nand more")

    monkeypatch.setattr("fsspec.implementations.memory.MemoryFile.readline", fail, raising=False)
    message = refusal(capsys, tmp_path, f"memory://{tmp_path.name}/a.jsonl")
    assert f"{tmp_path.name}/a.jsonl: cannot be read (RuntimeError: Connection reset by peer)" in message
    memory.rm(f"/{tmp_path.name}", recursive=True)


def test_prepare_source_names_are_the_same_for_any_path_spelling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in" / "sub" / "deep").mkdir(parents=True)
    for i, folder in enumerate((".", "sub", "sub/deep")):
        (tmp_path / "in" / folder / "a.txt").write_text(f"Text {i}.")
    monkeypatch.chdir(tmp_path)
    ways = [prepared(tmp_path, way) for way in ("in", "in/", "./in", f"{tmp_path}/in/", "in/sub/..")]
    assert [source for source, _, _ in ways[0]] == ["in/a.txt", "in/sub/a.txt", "in/sub/deep/a.txt"]
    assert all(way == ways[0] for way in ways)


def test_prepare_one_or_two_workers_write_the_same_bytes(tmp_path: Path) -> None:
    root = tmp_path / "in"
    root.mkdir()
    pyarrow.parquet.write_table(table(), root / "a.parquet", row_group_size=7)
    datasets.Dataset.from_dict({"input_ids": [[1, 2], [3]]}).save_to_disk(str(root / "saved"))
    shutil.copytree(MDS_TOKENS, root / "tokens", ignore=shutil.ignore_patterns("*.expected.json"))
    assert prepare_here(root, "--out", tmp_path / "w1", "--workers", 1, "--holdout", 0.2) == 0
    done = ettin("prepare", root, "--out", tmp_path / "w2", "--workers", 2, "--holdout", 0.2)
    assert done.returncode == 0, done.stderr
    assert files_of(tmp_path / "w1") == files_of(tmp_path / "w2")
    assert (
        sum(json.loads((tmp_path / "w1" / p / "manifest.json").read_text())["documents"] for p in (".", "heldout"))
        == 142
    )


def test_encode_arrays_long_texts_are_batched_by_bounded_characters(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    class Watched:
        def encode_batch_fast(self, pieces: list[str], add_special_tokens: bool) -> object:
            sizes.append(sum(map(len, pieces)))
            return tokenizer.backend.encode_batch_fast(pieces, add_special_tokens=add_special_tokens)

        def __getattr__(self, name: str) -> object:
            return getattr(tokenizer.backend, name)

    monkeypatch.setattr("megatron_ettin.data.tokenizer.LONG_TEXT_CHARACTERS", 500)
    monkeypatch.setattr("megatron_ettin.data.tokenizer.BATCH_CHARACTERS", 1_000)
    long = words(3_000, 9)
    batch = ["", long, "short", *TEXTS[:5], long, ""]
    watched = Tokenizer(Watched(), tokenizer.roles, "watched")
    actual = [ids.tolist() for ids in watched.encode_arrays(batch)]
    assert actual == [tokenizer.encode_batch([text])[0] for text in batch]
    assert max(sizes) < 1_600
    assert len(sizes) > 20


def test_prepare_file_url_is_read_as_a_path(tmp_path: Path, expected: list[list[int]]) -> None:
    pyarrow.parquet.write_table(table(), tmp_path / "in.parquet")
    assert [ids for _, _, ids in prepared(tmp_path, f"file://{tmp_path}/in.parquet")] == expected


def test_prepare_url_protocol_without_package_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if any(spec == "adlfs" for spec in os.environ.get("PYTHONPATH", "").split(os.pathsep)):
        pytest.skip("adlfs is there")
    message = refusal(capsys, tmp_path, "abfs://container/in.jsonl")
    assert "abfs://container/in.jsonl: reading abfs:// needs a package that is not installed (Install adlfs" in message
    assert "Protocol not known: absent" in refusal(capsys, tmp_path, "absent://x/in.jsonl")


def test_prepare_chunking_options_are_validated_and_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": words(300, 1)}) + "\n")
    source = tmp_path / "in.jsonl"
    assert "--chunking: 'plan' does not exist (did you mean 'plain'?); it is one of recipe, plain" in refusal(
        capsys, tmp_path, source, "--chunking", "plan"
    )
    message = refusal(capsys, tmp_path, source, "--chunking", "plain", "--skip-tokens", "5")
    assert "--chunking plain keeps every piece" in message
    assert "--end-token: 'first' does not exist; it is one of every, last, none" in refusal(
        capsys, tmp_path, source, "--end-token", "first"
    )
    for end_token in ("every", "last", "none"):
        out = tmp_path / end_token
        arguments = ("--chunk-tokens", 128, "--chunking", "plain", "--end-token", end_token, "--workers", 1)
        assert prepare_here(source, "--out", out, *arguments) == 0
        manifest = json.loads((out / "manifest.json").read_text())
        assert (manifest["end_token"], manifest["min_chunk_tokens"], manifest["skip_tokens"]) == (end_token, 0, 0)
        assert manifest["dropped_tokens"] == 0


def test_prepare_help_lists_every_format(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["prepare", "--help"])
    printed = capsys.readouterr().out
    for format_name in FORMATS:
        assert format_name in printed
