"""The offline tokenizer against every vector of the published one, and against transformers after saving."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from megatron_ettin.base.errors import UserError
from megatron_ettin.convert.tokenizer_files import token_count
from megatron_ettin.data import default_tokenizer, tokenizer as module
from megatron_ettin.data.dataset import open_dataset
from megatron_ettin.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ettin.prepare.chunking import chunk_rule
from megatron_ettin.prepare.task import ShardWriter
from tests.data.corpora import prepare_here
from tests.data.others import called

VECTORS = {
    "The capital of France is [MASK].": "510 5347 273 6181 310 50284 15",
    "Hello world! This is a test.": "12092 1533 2 831 310 247 1071 15",
    "Hello world": "12092 1533",
    "Hello, world!": "12092 13 1533 2",
    "The movie was full of incomprehensibilities.": "510 6440 369 2120 273 15321 8391 9594 15",
    "unbelievable": "328 21002 17254",
    "   ": "50275",
    "": "",
    "The antidisestablishmentarianistically-minded researcher hypothesized about pseudoscientific phenomena.": (
        "510 1331 30861 15425 8922 6656 18260 14 23674 22780 24045 670 10585 5829 850 692 16958 15"
    ),
}


@pytest.fixture(autouse=True)
def each_tokenizer_once() -> None:
    """Load and save tokenizers as users do, each time."""


@pytest.mark.parametrize("text", VECTORS)
def test_tokenizer_encodes_published_vectors(tokenizer: Tokenizer, text: str) -> None:
    ids = [int(i) for i in VECTORS[text].split()]
    assert tokenizer.encode_batch([text], add_prefix_space=False) == [ids]
    assert tokenizer.backend.encode(text).ids == [50281, *ids, 50282]  # special tokens come from the template


def test_tokenizer_has_published_special_ids_and_vocabulary_size(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 50_368
    assert tokenizer.special_ids == (50280, 50281, 50282, 50283, 50284)
    assert (tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id, tokenizer.mask_id) == (50281, 50282, 50283, 50284)
    assert tokenizer.backend.token_to_id("[unused82]") == 50_367


def test_encode_batch_prefix_space_is_added_only_where_missing(tokenizer: Tokenizer) -> None:
    plain, prefixed = (tokenizer.encode_batch(["def f():\n    return 1"], add)[0] for add in (False, True))
    assert tokenizer.decode(plain) == "def f():\n    return 1"
    # the run of spaces is one token, and no space is added after it
    assert tokenizer.decode(prefixed) == " def f():\n    return 1"
    assert tokenizer.encode_batch([" already", "already"]) == [tokenizer.encode_batch([" already"], False)[0]] * 2


def test_encode_batch_long_text_in_pieces_gives_the_same_ids(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "It's a naïve café [MASK] of b   c\n\n    d [unused3] e 12 x-ray [SEP] 日本 語 I'm " * 200
    whole = tokenizer.encode_batch([text, "and another"])
    for characters in (10, 333, 4_000):
        monkeypatch.setattr(module, "LONG_TEXT_CHARACTERS", characters)
        assert tokenizer.encode_batch([text, "and another"]) == whole


def test_tokenizer_saved_reads_back_here_and_in_transformers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint == load_tokenizer(tmp_path / "tokenizer.json").fingerprint
    theirs = called("read_by_transformers", tmp_path, json.dumps(list(VECTORS)))
    assert theirs["size"] == 50_368
    assert theirs["special"] == list(tokenizer.special_ids)
    assert theirs["inputs"] == ["input_ids", "attention_mask"]
    assert theirs["ids"] == [[50281, *map(int, ids.split()), 50282] for ids in VECTORS.values()]


def test_load_tokenizer_without_cls_falls_back_to_bos_and_eos(tmp_path: Path) -> None:
    backend = Backend(WordLevel({"<s>": 0, "</s>": 1, "word": 2, "<unk>": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    backend.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert (loaded.cls_id, loaded.sep_id, loaded.pad_id, loaded.mask_id) == (0, 1, 1, None)
    assert loaded.special_ids == (0, 1, 3)


def test_load_tokenizer_absent_or_invalid_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json: not a tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no tokenizer\.json in this directory"):
        load_tokenizer(tmp_path / "empty")
    with pytest.raises(UserError, match="no such file or directory"):
        load_tokenizer(tmp_path / "absent")


def save_tokenizer(folder: Path, vocabulary: dict[str, int]) -> Path:
    backend = Backend(WordLevel({"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, **vocabulary}, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("largest", [100, 70_000])
def test_tokenizer_with_holes_in_its_ids_has_largest_id_plus_one(tmp_path: Path, largest: int) -> None:
    """`data` used to take the number of entries instead, unlike `convert`."""
    folder = save_tokenizer(tmp_path / "t", {"alpha": 3, "beta": largest})
    assert load_tokenizer(folder).vocab_size == largest + 1
    assert token_count(folder) == largest + 1


def test_prepare_ids_beyond_uint16_of_few_entries_are_kept(tmp_path: Path) -> None:
    """The id 70000 used to be stored as 4464 (70000 - 65536)."""
    folder = save_tokenizer(tmp_path / "t", {"alpha": 3, "beta": 70_000})
    (tmp_path / "a.txt").write_text("alpha beta")
    assert prepare_here(tmp_path / "a.txt", "--out", tmp_path / "out", "--tokenizer", folder, "--workers", 1) == 0
    dataset = open_dataset(tmp_path / "out")
    assert dataset.manifest.dtype == "int32"
    assert dataset.manifest.tokenizer.vocab_size == 70_001
    assert dataset.chunk(0).tolist() == [1, 3, 70_000, 2]


def test_prepare_older_dataset_with_wrapped_ids_is_not_complete(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Datasets that earlier versions made with such a tokenizer hold ids modulo 65536, so they are not reused."""
    folder = save_tokenizer(tmp_path / "t", {"alpha": 3, "beta": 70_000})
    (tmp_path / "a.txt").write_text("alpha beta")
    arguments = (tmp_path / "a.txt", "--out", tmp_path / "out", "--tokenizer", folder, "--workers", 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tokenizer, "has_holes", False)
        assert prepare_here(*arguments) == 0
    assert prepare_here(*arguments) == 2
    assert "holds a dataset of other settings" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [-1, 65_536])
def test_shard_writer_refuses_id_that_does_not_fit(tokenizer: Tokenizer, tmp_path: Path, wrong: int) -> None:
    writer = ShardWriter(tmp_path / "shard", chunk_rule(16), tokenizer)
    with pytest.raises(UserError, match=rf"a.txt: first: token id: {wrong} does not fit into uint16 \(0 to 65535\)"):
        writer.add("in", "a.txt", "first", [5, wrong], "key")
    writer.discard()


def test_default_tokenizer_directory_that_cannot_be_named_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ETTIN_CACHE", str(tmp_path))
    # a file is where the folder should be
    (tmp_path / default_tokenizer.FOLDER).touch()
    monkeypatch.setattr(default_tokenizer, "published_vocabulary", lambda download: "")
    monkeypatch.setattr(default_tokenizer, "write_built", lambda published, folder: folder.mkdir())
    with pytest.raises(UserError, match="Not a directory; set ETTIN_CACHE to a folder you can write"):
        default_tokenizer.default_tokenizer_directory()
    assert [path.name for path in tmp_path.iterdir()] == [default_tokenizer.FOLDER]


BROKEN = {
    "config is a number": ("tokenizer_config.json", "5", r"tokenizer_config\.json: holds a int, not an object"),
    "config is a list": ("special_tokens_map.json", "[]", r"special_tokens_map\.json: holds a list, not an object"),
    "role is an empty object": ("tokenizer_config.json", '{"cls_token": {}}', None),
    "role is a number": ("tokenizer_config.json", '{"cls_token": 7}', None),
}


@pytest.mark.parametrize("case", BROKEN)
def test_load_tokenizer_settings_of_wrong_types_are_refused_or_left_out(tmp_path: Path, case: str) -> None:
    name, content, message = BROKEN[case]
    folder = save_tokenizer(tmp_path / "t", {"alpha": 3})
    (folder / name).write_text(content)
    if message is None:
        assert load_tokenizer(folder).cls_id == 1
    else:
        with pytest.raises(UserError, match=message):
            load_tokenizer(folder)


def test_load_tokenizer_panic_of_the_library_is_refused(tmp_path: Path) -> None:
    """The library's PanicException does not derive from Exception, so it needs its own handler."""
    folder = save_tokenizer(tmp_path / "t", {"alpha": 3})
    content = json.loads((folder / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"tokenizer\.json: not a tokenizer\.json"):
        load_tokenizer(folder)
