"""Open a file of torch.save without torch.load: a zip file of one pickle and the bytes of each storage.

The pickle is read as data (safe_unpickler.py). The bytes of a tensor are read when it is asked for, one storage at a
time, and checked against the zip file's own checksum, which torch.load does not do.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch

from megatron_ettin.base.errors import UserError
from megatron_ettin.convert.composer.safe_unpickler import TensorRecord, read_pickle

DTYPES = {"FloatStorage": torch.float32, "BFloat16Storage": torch.bfloat16, "HalfStorage": torch.float16}
_ZIP, _OLD = b"PK\x03\x04", b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_READ_BYTES = 1 << 24


class TorchFile:
    """An open file of torch.save.

    Attributes:
        path: the file.
        tree: what was saved, with a TensorRecord for every tensor.
    """

    def __init__(self, path: Path) -> None:
        """Read the pickle. Raises UserError for a file that torch.save did not write, or that is damaged."""
        self.path = path
        _check_format(path)
        try:
            self._zip = zipfile.ZipFile(path)
            names = [name for name in self._zip.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
            if len(names) != 1:
                raise UserError(f"{path}: a zip file that torch.save did not write (it has {len(names)} data.pkl)")
            self._root = names[0].partition("/")[0]
            if f"{self._root}/byteorder" in self._zip.NameToInfo:
                order = bytes(self._read_record("byteorder"))
                if order not in (b"", b"little"):
                    raise UserError(f"{path}: has byte order {order[:20]!r}; only little-endian files are read")
            self.tree: Any = read_pickle(bytes(self._read_record("data.pkl")))
        except (zipfile.BadZipFile, zipfile.LargeZipFile, ValueError, OSError, EOFError, RuntimeError) as error:
            raise _damaged(path, error) from None

    def read(self, record: TensorRecord) -> torch.Tensor:
        """Return the tensor, contiguous. Memory: its storage and, where that is larger, the tensor."""
        dtype, storage = DTYPES[record.dtype], record.storage
        name = f"data/{storage.key}"
        last = record.offset + sum((n - 1) * step for n, step in zip(record.shape, record.stride))
        if self._info(name).file_size != storage.items * dtype.itemsize or last >= storage.items:
            raise UserError(f"{self.path}: a tensor reaches outside its record {storage.key!r}; the file is damaged")
        try:
            whole = torch.frombuffer(self._read_record(name), dtype=dtype)
        except (zipfile.BadZipFile, EOFError, OSError, ValueError, RuntimeError) as error:
            raise _damaged(self.path, error) from None
        return whole.as_strided(record.shape, record.stride, record.offset).contiguous()

    def close(self) -> None:
        """Close the file."""
        self._zip.close()

    def _info(self, record: str) -> zipfile.ZipInfo:
        try:
            info = self._zip.getinfo(f"{self._root}/{record}")
        except KeyError:
            raise UserError(f"{self.path}: lacks its record {record!r}; it is damaged") from None
        # torch never compresses; a small file that claims to unfold into a large one is not torch's
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > self.path.stat().st_size:
            raise UserError(f"{self.path}: its record {record!r} is compressed; torch.save does not do that")
        return info

    def _read_record(self, record: str) -> bytearray:
        """Return the bytes of a record in a writable buffer, which torch.frombuffer needs."""
        info = self._info(record)
        buffer = bytearray(info.file_size)
        view, done = memoryview(buffer), 0
        with self._zip.open(info) as stream:
            while block := stream.read(_READ_BYTES):
                view[done : done + len(block)] = block
                done += len(block)
        if done != len(buffer):
            raise EOFError(f"{info.filename} ends after {done:,} of {len(buffer):,} bytes")
        return buffer


def _damaged(path: Path, error: Exception) -> UserError:
    reason = ascii(" ".join(str(error).split()))[1:-1]
    return UserError(f"{path}: truncated, damaged or not written by torch.save ({reason})")


def _check_format(path: Path) -> None:
    """Raise UserError where the first bytes are not those of a zip file."""
    if path.is_dir():
        raise UserError(f"{path}: a folder; give one .pt file (sharded checkpoints are not read)")
    try:
        with open(path, "rb") as file:
            first = file.read(len(_OLD))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    if first == _OLD:
        raise UserError(f"{path}: written in torch's format of before 1.6, which is not read; save it again with torch")
    if not first.startswith(_ZIP):
        raise UserError(f"{path}: not a file of torch.save (a zip file was expected)")
