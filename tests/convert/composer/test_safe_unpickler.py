"""Files that would run code, or that are damaged: no code runs, and weights are imported or refused in one line."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import sys
import zipfile

import pytest
import torch

from megatron_ettin.convert.composer.safe_unpickler import PlainDict, Stub, TensorRecord, read_pickle
from tests.convert.composer.trainer_files import composer_state, reference, refused, trainer_file, trainer_names
from tests.convert.folders import command

RAN: list[str] = []
WATCHED = ("os.", "subprocess.", "exec", "compile", "import", "socket.", "shutil.", "ctypes.", "pickle.find_class")
_armed = False


def _watch(event: str, arguments: tuple[object, ...]) -> None:
    if _armed and event.startswith(WATCHED):
        RAN.append(f"{event} {arguments!r}"[:200])


sys.addaudithook(_watch)  # an audit hook cannot be removed; it records only while a test has armed it


class watching:
    """Collect the watched audit events of Python in RAN while the body runs."""

    def __enter__(self):
        global _armed
        RAN.clear()
        _armed = True

    def __exit__(self, *_):
        global _armed
        _armed = False


class Calls:
    """An object whose pickle calls any function with any arguments, and optionally sets a state."""

    def __init__(self, function, *arguments, state=None):
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.call

    def __call__(self):  # so that one call's result can be called by another
        raise AssertionError


def attacks(marker):
    touch = f"open({str(marker)!r}, 'w').close()"
    return {
        "system": Calls(os.system, f"touch {marker}"),
        "eval": Calls(eval, touch),
        "exec": Calls(exec, touch),
        "getattr": Calls(Calls(getattr, Calls(__import__, "os"), "system"), f"touch {marker}"),
        "nested": Calls(map, eval, [touch]),
        "open": Calls(open, str(marker), "w"),
        "state": Calls(Stub, state={"__class__": Calls(eval, touch)}),
        "torch": Calls(torch.load, str(marker)),
        "bytes": Calls(torch.storage._load_from_bytes, pickle.dumps(Calls(os.system, f"touch {marker}"))),
    }


def test_audit_hook_sees_what_ordinary_unpickler_runs():
    with watching():
        pickle.loads(pickle.dumps(Calls(eval, "1 + 1")))
    assert any(event.startswith("pickle.find_class") for event in RAN)
    assert any("exec" in event for event in RAN)


@pytest.mark.parametrize("attack", list(attacks("x")))
@pytest.mark.parametrize("protocol", [2, 4])
def test_read_pickle_of_attack_runs_nothing(tmp_path, attack, protocol):
    marker = tmp_path / "ran"
    content = pickle.dumps({"bad": attacks(marker)[attack], "good": 1}, protocol)
    with watching():
        tree = read_pickle(content)
    assert not marker.exists()
    assert RAN == []
    assert isinstance(tree["bad"], Stub)
    assert tree["good"] == 1


@pytest.mark.parametrize(
    "content",
    [
        b"cos\nsystem\n(S'touch ran'\ntR.",  # GLOBAL, REDUCE
        b"(S'touch ran'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'touch ran'\no.",  # OBJ
        b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x0bopen('ran')\x85R.",  # STACK_GLOBAL
        b"\x80\x02cos\nsystem\n)\x81}X\x01\x00\x00\x00aK\x01sb.",  # NEWOBJ, BUILD
        b"\x80\x04\x8c\x02os\x8c\x11path.os.system\x8c\x00\x86\x93.",  # a dotted path, badly formed
        b"\x80\x02ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00itemsK\x01sb.",  # an attribute over a method
        b"\x80\x02ccollections\nOrderedDict\n}X\x0b\x00\x00\x00__setitem__K\x01sb.",  # state for a class
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x0c\x00\x00\x00__defaults__K\x01s\x86b.",  # for a function
        b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\nNX\x09\x00\x00\x00touch ran\x85tR.",
        b"\x80\x02(K\x01K\x02tQ.",  # a persistent id that is no storage
    ],
)
def test_read_pickle_of_hand_made_opcodes_runs_nothing(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    with watching(), contextlib.suppress(ValueError):
        read_pickle(content)
    assert RAN == []
    assert list(tmp_path.iterdir()) == []
    assert PlainDict.__setitem__ is dict.__setitem__
    tensor = read_pickle(
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQK\x00K\x02K\x02\x86K\x02K\x01\x86\x89NtR."
    )
    assert isinstance(tensor, TensorRecord)
    assert tensor.shape == (2, 2)


@pytest.mark.parametrize("attack", list(attacks("x")))
def test_from_composer_hostile_state_next_to_weights_is_ignored(tmp_path, capsys, attack):
    marker = tmp_path / "ran"
    tree = composer_state(trainer_names(reference("mlm"), "mlm"), "mlm")
    tree["state"]["callbacks"] = tree["rng"] = attacks(marker)[attack]
    torch.save(tree, tmp_path / "file.pt")
    status, _, err = command(capsys, "from-composer", tmp_path / "file.pt", tmp_path / "ours")
    assert status == 0, err
    assert not marker.exists()
    assert (tmp_path / "ours" / "config.yaml").is_file()


@pytest.mark.parametrize("attack", list(attacks("x")))
@pytest.mark.parametrize("where", ["model", "weight", "record"])
def test_from_composer_hostile_weights_are_refused_and_not_run(tmp_path, capsys, attack, where):
    marker = tmp_path / "ran"
    bad = attacks(marker)[attack]
    tree = composer_state(trainer_names(reference("mlm"), "mlm"), "mlm")
    if where == "model":
        tree["state"]["model"] = bad
    elif where == "weight":
        tree["state"]["model"]["model.bert.final_norm.weight"] = bad
    else:
        content = tree["state"]["integrations"]["huggingface"]["model"]["config"]["content"]
        content["rotary_emb_base"] = content["num_hidden_layers"] = bad
    torch.save(tree, tmp_path / "file.pt")
    refused(capsys, tmp_path, tmp_path / "file.pt", "")
    assert not marker.exists()


def test_from_composer_file_of_another_format_is_refused(tmp_path, capsys):
    trainer_file(tmp_path / "good.pt", "mlm")
    whole = (tmp_path / "good.pt").read_bytes()
    bad = tmp_path / "bad.pt"
    for content, message in (
        (b"", "not a file of torch.save"),
        (b"weights", "not a file of torch.save"),
        (b"\x1f\x8b" + whole, "not a file of torch.save"),
        (whole[:1000], "truncated"),
        (whole[:-100], "truncated"),
        (pickle.dumps({"state": 1}), "not a file of torch.save"),
    ):
        bad.write_bytes(content)
        refused(capsys, tmp_path, bad, message)
    torch.save({"a": torch.ones(2)}, bad, _use_new_zipfile_serialization=False)
    refused(capsys, tmp_path, bad, "before 1.6")
    with zipfile.ZipFile(bad, "w") as out:
        out.writestr("a/words.txt", "hello")
    refused(capsys, tmp_path, bad, "a zip file that torch.save did not write")
    refused(capsys, tmp_path, tmp_path / "missing.pt", "No such file")
    (tmp_path / "folder").mkdir()
    refused(capsys, tmp_path, tmp_path / "folder", "a folder")
    torch.save({"state": {"model": {}, "optimizers": {"a": torch.ones(2)}}}, bad)
    refused(capsys, tmp_path, bad, "no weights found")


def test_from_composer_damaged_pickle_is_refused(tmp_path, capsys):
    trainer_file(tmp_path / "good.pt", "mlm")
    for change in (lambda content: content[:-20], lambda content: b"\x80\x02}q\x00(K\x01." + content, lambda _: b""):
        rewrite(tmp_path / "good.pt", tmp_path / "bad.pt", "data.pkl", change)
        refused(capsys, tmp_path, tmp_path / "bad.pt", "bad.pt: ")


def test_from_composer_compressed_record_is_refused(tmp_path, capsys):
    """Refuse a zip bomb: a small record that declares a large decompressed size."""
    trainer_file(tmp_path / "good.pt", "mlm")
    rewrite(tmp_path / "good.pt", tmp_path / "bad.pt", "data/0", lambda content: content, zipfile.ZIP_DEFLATED)
    refused(capsys, tmp_path, tmp_path / "bad.pt", "is compressed")


def test_from_composer_flipped_bit_in_weight_is_refused(tmp_path, capsys):
    trainer_file(tmp_path / "file.pt", "mlm")
    content = bytearray((tmp_path / "file.pt").read_bytes())
    with zipfile.ZipFile(io.BytesIO(content)) as held:
        info = next(info for info in held.infolist() if info.filename.endswith("/data/0"))
    content[info.header_offset + 512] ^= 1
    (tmp_path / "file.pt").write_bytes(content)
    refused(capsys, tmp_path, tmp_path / "file.pt", "Bad CRC-32")


def test_from_composer_without_optimizer_records_is_imported(tmp_path, capsys):
    """Import a file from which the records of the optimizer's state are removed, because the import needs none."""
    model = trainer_names(reference("mlm"), "mlm")
    torch.save(composer_state(model, "mlm"), tmp_path / "file.pt")
    largest = max(tensor.nbytes for tensor in model.values())
    with zipfile.ZipFile(tmp_path / "file.pt") as held, zipfile.ZipFile(tmp_path / "less.pt", "w") as out:
        data = [info for info in held.infolist() if "/data/" in info.filename]
        kept = {info.filename for info in data[: len({t.untyped_storage().data_ptr() for t in model.values()})]}
        assert max(info.file_size for info in data if info.filename in kept) == largest
        for info in held.infolist():
            if info in data and info.filename not in kept:
                continue
            out.writestr(info.filename, held.read(info))
    status, _, err = command(capsys, "from-composer", tmp_path / "less.pt", tmp_path / "out")
    assert status == 0, err


def rewrite(source, target, record, change, compression=zipfile.ZIP_STORED):
    """Copy a file of torch.save, with `change` applied to one of its records."""
    with zipfile.ZipFile(source) as held, zipfile.ZipFile(target, "w") as out:
        for info in held.infolist():
            content, wanted = held.read(info), info.filename.endswith(f"/{record}")
            compress_type = compression if wanted else zipfile.ZIP_STORED
            out.writestr(info.filename, change(content) if wanted else content, compress_type=compress_type)
