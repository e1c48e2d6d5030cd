"""Read a file of torch.save without torch.load: a zip file of one pickle and the bytes of each storage.

A pickle is a program that may call whatever it can name. `StubUnpickler` reads it as data. The few names in `STAND_INS`
become functions of this module; every other name becomes a `Stub`, which accepts any call and does nothing. No module
is imported and no class of torch is instantiated. Tensors stay descriptions until `TorchFile.read`, so an optimizer's
state is never read. `read` reads one storage and checks the zip file's checksum, which torch.load does not do.
"""

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
_READ_BYTES = 1 << 24


class Stub:
    """Stand-in without effect for a class, an instance or a function that a pickle names."""

    __slots__ = ()

    def __new__(cls, *args: Any, **kwargs: Any) -> Stub:
        """Accept any arguments."""
        return super().__new__(cls)

    def __call__(self, *args: Any) -> Any:
        """Return the stub itself, whatever the arguments are."""
        return self

    def _ignore(*args: Any) -> None:
        """Accept any arguments, also when called on the class without an instance."""

    # what a pickle may do to an object: set its state, items and members
    __setstate__ = __setitem__ = append = extend = add = _ignore


class StubFunction(Stub):
    """Wrapper of a function that a pickle may call; the pickle cannot change its attributes."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        """Call the function."""
        return self._function(*args)


class PlainDict(dict[Any, Any]):
    """Stand-in for OrderedDict without attributes: a pickle that sets `items` on it would change how it is read."""

    __slots__ = ()

    def __setstate__(*args: Any) -> None:
        return None


class StorageRecord(NamedTuple):
    """Description of a storage whose bytes were not read."""

    type_name: str
    """Name of its class in the pickle, such as `FloatStorage`."""
    key: str
    """Name of the record in the zip file that holds the bytes."""
    items: int
    """Number of elements."""


class TensorRecord(NamedTuple):
    """Description of a tensor that was not read; offset and stride count elements of its storage."""

    storage: StorageRecord
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def dtype(self) -> str:
        """Name of the class of its storage, such as `FloatStorage`."""
        return self.storage.type_name


def _first(value: Any = None, *rest: Any) -> Any:
    """Return the first argument: the tuple of a torch.Size, the tensor of a parameter."""
    return value


def _tensor(storage: Any = None, offset: Any = 0, shape: Any = (), stride: Any = (), *rest: Any) -> Any:
    """Return the TensorRecord of these arguments; a Stub if they are malformed."""
    well_formed = isinstance(shape, tuple) and isinstance(stride, tuple) and len(shape) == len(stride)
    if (
        isinstance(storage, StorageRecord)
        and well_formed
        and all(type(number) is int and 0 <= number < 1 << 62 for number in (offset, *shape, *stride))
    ):
        return TensorRecord(storage, offset, shape, stride)
    return Stub()


def _from_type(function: Any = None, tensor_class: Any = None, args: Any = (), *rest: Any) -> Any:
    """Return `function(*args)`, the description of a tensor with attributes; its class and attributes are dropped."""
    return function(*args) if isinstance(function, StubFunction) and isinstance(args, tuple) else Stub()


STAND_INS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): PlainDict,
    ("torch", "Size"): StubFunction(_first),
    ("torch._utils", "_rebuild_tensor_v2"): StubFunction(_tensor),
    ("torch._utils", "_rebuild_parameter"): StubFunction(_first),
    ("torch._utils", "_rebuild_parameter_with_state"): StubFunction(_first),
    ("torch._tensor", "_rebuild_from_type_v2"): StubFunction(_from_type),
}


class StubUnpickler(pickle.Unpickler):
    """Unpickler that resolves the names of tensors and dictionaries; every other name becomes a Stub."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in for a name; for a class of storages, its name as a string."""
        if module in ("torch", "torch.cuda", "torch.storage") and name.endswith("Storage"):
            return name
        return STAND_INS.get((module, name), Stub)

    def persistent_load(self, saved: Any) -> Any:
        """Return the StorageRecord of a storage: torch.save keeps nothing else outside of the pickle."""
        match saved:
            case ("storage", str(name), str(key), _, int(items)) if type(saved) is tuple:
                return StorageRecord(name, key, items)
        return Stub()


def read_pickle(content: bytes) -> Any:
    """Return the objects of a pickle. Raises ValueError if it is damaged or claims to be larger than it is."""
    try:
        check_pickle(content)
        return StubUnpickler(io.BytesIO(content)).load()
    except Exception as error:
        # a damaged pickle may fail in any way
        raise ValueError(f"{type(error).__name__}: {error}") from None


class TorchFile:
    """Open file of torch.save.

    Attributes:
        path: the file.
        tree: the saved object, with a TensorRecord in place of every tensor.
    """

    def __init__(self, path: Path) -> None:
        """Open the file and read its pickle. Raises UserError if torch.save did not write it or it is damaged."""
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
        """Read a tensor.

        Returns:
            The contiguous tensor. Its whole storage is read, so memory holds both if the storage is larger.

        Raises:
            UserError: the file is damaged.
        """
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
        # torch.save never compresses; a record larger than the file would exhaust the memory
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
    """Raise UserError if the first bytes are not those of a zip file."""
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
