"""Files that torch.save did not write, or that are damaged."""

from __future__ import annotations

import io
import pickle
import zipfile

import torch

from tests.convert.composer.trainer_files import composer_state, reference, refused, trainer_file, trainer_names
from tests.convert.folders import command


def test_from_composer_file_of_another_format_is_refused(tmp_path, capsys):
    trainer_file(tmp_path / "good.pt", "mlm")
    good = (tmp_path / "good.pt").read_bytes()
    bad = tmp_path / "bad.pt"
    for content, message in (
        (b"", "not a file of torch.save"),
        (b"weights", "not a file of torch.save"),
        (b"\x1f\x8b" + good, "not a file of torch.save"),
        (good[:1000], "truncated"),
        (good[:-100], "truncated"),
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
    """A zip bomb: a small file that says it unfolds into a large one."""
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
    """Records of the optimizer's state are taken out of the file: the import does not miss them."""
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
    """Copy a file of torch.save with one record changed."""
    with zipfile.ZipFile(source) as held, zipfile.ZipFile(target, "w") as out:
        for info in held.infolist():
            content, wanted = held.read(info), info.filename.endswith(f"/{record}")
            compress_type = compression if wanted else zipfile.ZIP_STORED
            out.writestr(info.filename, change(content) if wanted else content, compress_type=compress_type)
