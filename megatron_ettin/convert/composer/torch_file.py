"""A file of torch.save, opened without torch.load: a zip of one pickle and the bytes of each storage.

The pickle is read as data (inert.py). A tensor's bytes are read when it is asked for, one storage at a time, and
checked against the zip's own checksum, which torch.load does not do.

A pickle read as data: dictionaries, lists, numbers, texts and descriptions of tensors. Nothing it asks for is run.

A pickle is a program that may call whatever it can name. Here every name leads to `Inert`, which takes any call and
does nothing, but for the few in `MEANINGS`; those are functions of this file. No module is imported, no class of torch
is made, and tensors stay descriptions, so the gigabytes of an optimizer cost nothing."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_ettin.base.errors import UserError
from megatron_ettin.checkpoint.reader import check_pickle

DTYPES = {"FloatStorage": torch.float32, "BFloat16Storage": torch.bfloat16, "HalfStorage": torch.float16}
_ZIP, _OLD = b"PK\x03\x04", b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_PIECE_BYTES = 1 << 24


class TorchFile:
    """`tree` is what was saved, with a TensorRecord for every tensor; `read` gives the tensor."""

    def __init__(self, path: Path) -> None:
        self.path = path
        _check_kind(path)
        try:
            self._zip = zipfile.ZipFile(path)
            names = [name for name in self._zip.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
            if len(names) != 1:
                raise UserError(f"{path}: a zip file that torch.save did not write (it has {len(names)} data.pkl)")
            self._root = names[0].partition("/")[0]
            order = self._bytes("byteorder", optional=True)
            if order not in (b"", b"little"):
                raise UserError(f"{path}: has byte order {order[:20]!r}; only little-endian files are read")
            self.tree: Any = read_pickle(self._bytes("data.pkl"))
        except (zipfile.BadZipFile, zipfile.LargeZipFile, ValueError, OSError, EOFError, RuntimeError) as error:
            raise _damaged(path, error) from None

    def _bytes(self, record: str, optional: bool = False) -> bytes:
        if optional and f"{self._root}/{record}" not in self._zip.NameToInfo:
            return b""
        return bytes(self._fill(self._info(record)))

    def _info(self, record: str) -> zipfile.ZipInfo:
        try:
            info = self._zip.getinfo(f"{self._root}/{record}")
        except KeyError:
            raise UserError(f"{self.path}: lacks its record {record!r}; it is damaged") from None
        # torch never compresses; a small file that claims to unfold into a large one is not torch's
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > self.path.stat().st_size:
            raise UserError(f"{self.path}: its record {record!r} is compressed; torch.save does not do that")
        return info

    def _fill(self, info: zipfile.ZipInfo) -> bytearray:
        buffer = bytearray(info.file_size)
        view, done = memoryview(buffer), 0
        with self._zip.open(info) as stream:
            while piece := stream.read(_PIECE_BYTES):
                view[done : done + len(piece)] = piece
                done += len(piece)
        if done != len(buffer):
            raise EOFError(f"{info.filename} ends after {done:,} of {len(buffer):,} bytes")
        return buffer

    def read(self, record: TensorRecord) -> torch.Tensor:
        """The tensor, contiguous; the memory of its storage and, where that is larger, of itself."""
        dtype, storage = DTYPES[record.storage.kind], record.storage
        info = self._info(f"data/{storage.key}")
        last = record.offset + sum((n - 1) * step for n, step in zip(record.shape, record.stride))
        if info.file_size != storage.items * dtype.itemsize or last >= storage.items:
            raise UserError(f"{self.path}: a tensor reaches outside its record {storage.key!r}; the file is damaged")
        try:
            whole = torch.frombuffer(self._fill(info), dtype=dtype)
        except (zipfile.BadZipFile, EOFError, OSError, ValueError, RuntimeError) as error:
            raise _damaged(self.path, error) from None
        return whole.as_strided(record.shape, record.stride, record.offset).contiguous()

    def close(self) -> None:
        self._zip.close()


def _damaged(path: Path, error: Exception) -> UserError:
    words = ascii(" ".join(str(error).split()))[1:-1]
    return UserError(f"{path}: truncated, damaged or not written by torch.save ({words})")


def _check_kind(path: Path) -> None:
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


class Inert:
    """What a pickle gets for a name that means nothing here: a class, its instance, a function, all the same."""

    __slots__ = ()

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        return super().__new__(cls)

    def __call__(self, *args: Any, **kwargs: Any) -> Inert:
        return self

    def _ignore(*args: Any, **kwargs: Any) -> None:  # also called on the class, without an instance
        return None

    # what a pickle may do to an object: give it state, items, members
    __setstate__ = __setitem__ = append = extend = add = _ignore


class PlainDict(dict[Any, Any]):
    """An OrderedDict without its attributes: torch gives a state dict `_metadata`, another could give it an `items`."""

    __slots__ = ()

    def __setstate__(*args: Any) -> None:
        return None


class StorageKind(NamedTuple):
    """Where a pickle names a class of storages: `FloatStorage`."""

    name: str


class StorageRecord(NamedTuple):
    kind: str
    key: str  # names the record of the file that holds the bytes
    items: int


class TensorRecord(NamedTuple):
    """A tensor that was not read: where its items lie in a storage."""

    storage: StorageRecord
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Function:
    """One of our functions as a pickle may call it; anything it makes of strange arguments is inert."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def __setstate__(*args: Any) -> None:
        return None


def _tensor(storage: Any = None, offset: Any = 0, shape: Any = (), stride: Any = (), *rest: Any) -> Any:
    whole = isinstance(shape, tuple) and isinstance(stride, tuple) and len(shape) == len(stride)
    if not isinstance(storage, StorageRecord) or not whole:
        return Inert()
    numbers = (offset, *shape, *stride)
    if not all(type(number) is int and 0 <= number < 1 << 62 for number in numbers):
        return Inert()
    return TensorRecord(storage, offset, shape, stride)


def _inner(data: Any = None, *rest: Any) -> Any:
    """A parameter is the tensor in it."""
    return data if isinstance(data, TensorRecord) else Inert()


def _typed(function: Any = None, kind: Any = None, args: Any = (), *rest: Any) -> Any:
    """A tensor with attributes: how to rebuild it, its class, the arguments, the attributes."""
    return function(*args) if isinstance(function, Function) and isinstance(args, tuple) else Inert()


def _shape(sizes: Any = (), *rest: Any) -> Any:
    return sizes if isinstance(sizes, tuple) else Inert()


MEANINGS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): PlainDict,
    ("torch", "Size"): Function(_shape),
    ("torch._utils", "_rebuild_tensor_v2"): Function(_tensor),
    ("torch._utils", "_rebuild_parameter"): Function(_inner),
    ("torch._utils", "_rebuild_parameter_with_state"): Function(_inner),
    ("torch._tensor", "_rebuild_from_type_v2"): Function(_typed),
}
STORAGE_MODULES = ("torch", "torch.cuda", "torch.storage")


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module in STORAGE_MODULES and name.endswith("Storage"):
            return StorageKind(name)
        return MEANINGS.get((module, name), Inert)

    def persistent_load(self, saved: Any) -> Any:
        if not isinstance(saved, tuple) or len(saved) != 5 or saved[0] != "storage":
            return Inert()
        kind, key, items = saved[1], saved[2], saved[4]
        if not isinstance(kind, StorageKind) or not isinstance(key, str) or type(items) is not int:
            return Inert()
        return StorageRecord(kind.name, key, items)


def read_pickle(content: bytes) -> Any:
    """The tree of a pickle. Raises ValueError for one that is damaged."""
    try:
        check_pickle(content)
        return _Reader(io.BytesIO(content)).load()
    except Exception as error:  # a damaged pickle may fail in any way
        raise ValueError(f"{type(error).__name__}: {error}") from None
