"""Read torch_dist checkpoints without unpickling anything that a checkpoint could abuse.

torch reads `.metadata` by plain pickle.load and byte entries by torch.load(weights_only=False). Both run any code that
the file contains. Here `.metadata` is unpickled with an allow-list of the dozen classes that it needs, and byte entries
are refused (our checkpoints have none). Core takes no argument for the reader or the planner, so `load_strategy` swaps
two names in core's module while it loads. `CheckpointReader` needs no process group and holds one tensor at a time;
converting and inspecting use it.

`check_pickle` refuses a pickle that claims more data than the file has. Python's unpickler allocates the size that an
opcode names before it reads the data, so eight bytes of a file can allocate tens of gigabytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import io
import os
import pickle
import pickletools
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner

from megatron_ettin.base.errors import UserError, first_line
from megatron_ettin.base.paths import Links, path_in

_DTYPES = "float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 int64 int32 int16 int8 uint8 bool"
ALLOWED = {
    "torch.distributed.checkpoint.metadata": [
        *("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties"),
        *("MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"),
    ],
    "torch.distributed.checkpoint.planner": [
        *("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"),
    ],
    "torch.distributed.checkpoint.filesystem": ["_StorageInfo", "_StoragePrefix"],
    "torch": ["Size", *_DTYPES.split()],
    "torch.serialization": ["_get_layout"],
    "collections": ["OrderedDict"],
    # torch records the folder as the Path object that it was given
    "pathlib": ["PosixPath", "PurePosixPath", "WindowsPath"],
    "pathlib._local": ["PosixPath", "PurePosixPath", "WindowsPath"],
}
# errors that torch and pickle raise for a damaged or hostile file
_DAMAGE = (
    *(RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError),
    *(AssertionError, ImportError, OverflowError, MemoryError, struct.error, pickle.PickleError),
)


class AllowListed(pickle.Unpickler):
    """Unpickler that allows the classes of `.metadata` and no others."""

    def find_class(self, module: str, name: str) -> Any:
        """Return an allowed class. Raises UnpicklingError for any other."""
        if (module, name) == ("builtins", "getattr"):
            # Python 3.11.0 to 3.11.3 pickle a member of an enumeration as a call of getattr
            return _member
        if name not in ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, for which a checkpoint has no use")
        return super().find_class(module, name)


def _member(enumeration: Any, name: Any) -> Any:
    """Return a member of an allowed enumeration; refuse a getattr of anything else."""
    if not (isinstance(enumeration, enum.EnumMeta) and isinstance(name, str) and name in enumeration.__members__):
        raise pickle.UnpicklingError(f"it asks for {name!r} of {enumeration!r}, for which a checkpoint has no use")
    return enumeration[name]


def _checked(metadata: Any, path: Path) -> Metadata:
    """Return `metadata` if it has the shape that torch writes and names only files inside the checkpoint."""
    if not isinstance(metadata, Metadata) or not isinstance(metadata.state_dict_metadata, dict):
        raise UserError(f"{path}: does not describe a checkpoint (found {type(metadata).__name__})")
    if not isinstance(metadata.storage_data, dict):
        raise UserError(f"{path}: says nothing of where tensors lie")
    for key, entry in metadata.state_dict_metadata.items():
        if not isinstance(key, str) or not key.isprintable() or not _is_whole(entry):
            raise UserError(f"{path}: what it says of {str(key)[:60]!r} is not what torch writes")
    for index, info in metadata.storage_data.items():
        if not isinstance(index, MetadataIndex) or not _is_storage_info(index, info):
            raise UserError(f"{path}: a place in its files is not what torch writes")
        path_in(path.parent, info.relative_path, path, nested=True)
        if getattr(info, "transform_descriptors", None):
            raise UserError(f"{path}: {index.fqn} is stored through an extension; only plain tensors are read")
    return metadata


def _is_whole(entry: Any) -> bool:
    """Return whether an entry has all fields that are read later, because an unpickled object may lack any."""
    if not isinstance(entry, TensorStorageMetadata):
        return isinstance(entry, BytesStorageMetadata)
    sizes = [getattr(entry, "size", None)]
    for chunk in getattr(entry, "chunks", [None]):
        sizes += [getattr(chunk, "offsets", None), getattr(chunk, "sizes", None)]
    dtype = getattr(getattr(entry, "properties", None), "dtype", None)
    return isinstance(dtype, torch.dtype) and all(
        isinstance(one, torch.Size) and len(one) == len(entry.size) and all(n >= 0 for n in one) for one in sizes
    )


def _is_storage_info(index: MetadataIndex, info: Any) -> bool:
    """Return whether `info` says where a chunk lies, in the fields that torch writes."""
    numbers = [getattr(info, "offset", None), getattr(info, "length", None)]
    names = [getattr(index, "fqn", None), getattr(info, "relative_path", None)]
    offset = getattr(index, "offset", None)
    return (
        all(isinstance(one, int) and one >= 0 for one in numbers)
        # the names appear in messages of one line
        and all(isinstance(one, str) and one.isprintable() for one in names)
        and (offset is None or isinstance(offset, torch.Size))
    )


def _read_metadata(path: Path) -> Metadata:
    try:
        content = path.read_bytes()
        check_pickle(content)
        return _checked(AllowListed(io.BytesIO(content)).load(), path)
    except FileNotFoundError:
        raise UserError(f"{path}: missing; this is no torch_dist checkpoint, or a torn one") from None
    except _DAMAGE as error:
        raise UserError(f"{path}: refused: {first_line(error)}") from None


def file_in(folder: Path | str | os.PathLike[str], name: str) -> Path:
    """Return the path of a file that `.metadata` names. Links were refused when `.metadata` was read."""
    return path_in(Path(folder), name, Path(folder) / ".metadata", nested=True, links=Links.UNCHECKED)


class SafeReader(FileSystemReader):
    """torch's reader with an allow-list for `.metadata`, which is read once, and with errors that name the file."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self._cached: Metadata | None = None
        # kept because torch swallows an error of read_metadata
        self.refusal: UserError | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the checked content of `.metadata`."""
        if self._cached is None:
            try:
                self._cached = _read_metadata(Path(self.path) / ".metadata")
            except UserError as error:
                self.refusal = error
                raise
        if self._cached.storage_meta is None:
            self._cached.storage_meta = StorageMeta()
        self._cached.storage_meta.load_id = self.load_id
        return self._cached

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Any:
        """Read the planned items file by file, so that an error names the file."""
        per_file: dict[str, list[Any]] = {}
        for item in plan.items:
            per_file.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        done: Any = torch.futures.Future()
        for name, items in per_file.items():
            # sorted by offset, so that the disk reads the file from front to back
            items.sort(key=lambda item: self.storage_data[item.storage_index].offset)
            with _naming(file_in(self.path, name)):
                super().read_data(dataclasses.replace(plan, items=items), planner)
        done.set_result(None)
        return done

    def read_chunk(self, index: MetadataIndex) -> torch.Tensor:
        """Read one stored chunk of a tensor."""
        info = self.read_metadata().storage_data[index]
        path = file_in(self.path, info.relative_path)
        with _naming(path), open(path, "rb") as file:
            tensor: torch.Tensor = torch.load(self._slice_file(file, info), map_location="cpu", weights_only=True)
            return tensor


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn any error that a damaged file raises in the block into a UserError that names the file."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path}: missing; the checkpoint is incomplete") from None
    except _DAMAGE as error:
        raise UserError(f"{path}: damaged or refused ({first_line(error)})") from error


class CheckpointReader:
    """Reader of full tensors, one at a time, of a checkpoint of any layout. It needs no process group."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._reader = SafeReader(self.path)
        self._metadata = self._reader.read_metadata()

    def keys(self) -> list[str]:
        """Return the names of all tensors, sorted."""
        entries = self._metadata.state_dict_metadata
        return sorted(key for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata))

    def _entry(self, key: str) -> TensorStorageMetadata:
        entry = self._metadata.state_dict_metadata.get(key)
        if entry is None:
            raise UserError(f"{self.path}: no tensor {key!r}; {len(self.keys())} others are there")
        if not isinstance(entry, TensorStorageMetadata):
            raise UserError(f"{self.path}: {key} is a pickled object, not a tensor; refused")
        return entry

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of a full tensor."""
        return tuple(self._entry(key).size)

    def dtype(self, key: str) -> torch.dtype:
        """Return the type of a tensor's elements."""
        return self._entry(key).properties.dtype

    def read(self, key: str) -> torch.Tensor:
        """Read a full tensor. This needs memory for the tensor and for its largest stored chunk."""
        entry = self._entry(key)
        self._check_coverage(key, entry)
        self._check_sizes(key, entry)
        if len(entry.chunks) == 1:
            return self._chunk(key, entry, 0)
        whole = torch.empty(entry.size, dtype=entry.properties.dtype)
        for number, chunk in enumerate(entry.chunks):
            box = tuple(slice(first, first + size) for first, size in zip(chunk.offsets, chunk.sizes))
            whole[box] = self._chunk(key, entry, number)
        return whole

    def _chunk(self, key: str, entry: TensorStorageMetadata, number: int) -> torch.Tensor:
        chunk = entry.chunks[number]
        index = MetadataIndex(key, chunk.offsets)
        tensor = self._reader.read_chunk(index)
        file = file_in(self.path, self._metadata.storage_data[index].relative_path)
        dtype = entry.properties.dtype
        if not isinstance(tensor, torch.Tensor) or tensor.shape != chunk.sizes or tensor.dtype != dtype:
            raise UserError(f"{file}: {key} is not the {dtype} tensor {tuple(chunk.sizes)} that .metadata says")
        return tensor

    def _check_sizes(self, key: str, entry: TensorStorageMetadata) -> None:
        """Raise UserError, before memory is allocated, if the files are too small for a tensor."""
        for chunk in entry.chunks:
            info = self._metadata.storage_data.get(MetadataIndex(key, chunk.offsets))
            wanted = chunk.sizes.numel() * entry.properties.dtype.itemsize
            if info is None or info.length < wanted:
                raise UserError(f"{self.path / '.metadata'}: a chunk of {key} is not stored as large as it is")
            file = file_in(self.path, info.relative_path)
            if file.is_file() and file.stat().st_size < info.offset + info.length:
                raise UserError(f"{file}: ends before {key}, which .metadata places there; the file is torn")

    def _check_coverage(self, key: str, entry: TensorStorageMetadata) -> None:
        """Raise UserError if the chunks do not tile the tensor, because a gap would be left uninitialized."""
        boxes = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks]
        volume = sum(torch.Size(sizes).numel() for _, sizes in boxes)
        inside = all(o >= 0 and o + s <= n for offsets, sizes in boxes for o, s, n in zip(offsets, sizes, entry.size))
        if volume != entry.size.numel() or not inside or _overlap(boxes):
            raise UserError(f"{self.path / '.metadata'}: the chunks of {key} do not tile its shape {tuple(entry.size)}")


def _overlap(boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    return any(
        all(a < b + t and b < a + s for a, s, b, t in zip(*first, *second))
        for number, first in enumerate(boxes)
        for second in boxes[:number]
    )


def read_common(path: Path) -> Any:
    """Read common.pt of a checkpoint with torch's weights-only unpickler. Raises UserError."""
    file = Path(path) / "common.pt"
    with _naming(file):
        return torch.load(file, map_location="cpu", weights_only=True)


def _cause(failure: CheckpointException, folder: Any) -> UserError:
    """Return the error of the first rank that failed, as a UserError of one line."""
    error = next(iter(failure.failures.values()))[0]
    return error if isinstance(error, UserError) else UserError(f"checkpoint {folder}: {first_line(error)[:300]}")


def load_strategy() -> Any:
    """Return core's sharded load strategy on the safe reader and planner, for dist_checkpointing.load."""
    # imported here because it takes seconds, and converting and inspecting do not need it
    import megatron.core.dist_checkpointing.strategies.torch as core

    class SafePlanner(core.MCoreLoadPlanner):
        def load_bytes(self, read_item: Any, value: Any) -> None:
            raise pickle.UnpicklingError(f"{read_item.dest_index.fqn} is a pickled object, not a tensor")

    class SafeLoadStrategy(core.TorchDistLoadShardedStrategy):
        def load(self, sharded_state_dict: Any, checkpoint_dir: Any) -> Any:
            reader = SafeReader(checkpoint_dir)
            kept = core._get_filesystem_reader, core.MCoreLoadPlanner
            core._get_filesystem_reader, core.MCoreLoadPlanner = (lambda *_, **__: reader), SafePlanner
            try:
                return super().load(sharded_state_dict, checkpoint_dir)
            # core raises this on every rank, with the errors of the failing ranks inside
            except CheckpointException as failure:
                raise reader.refusal or _cause(failure, checkpoint_dir) from failure
            finally:
                core._get_filesystem_reader, core.MCoreLoadPlanner = kept

    return SafeLoadStrategy()


def common_strategy() -> Any:
    """Return core's strategy for common.pt through `read_common`, for dist_checkpointing.load."""
    from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy

    class SafeCommonStrategy(TorchCommonLoadStrategy):
        def load_common(self, checkpoint_dir: Any) -> Any:
            return read_common(Path(checkpoint_dir))

    return SafeCommonStrategy()


_MEMO = ("PUT", "BINPUT", "LONG_BINPUT")
# largest number of nested marks in a pickle; those of our checkpoints have a handful
_DEEPEST = 10_000


def check_pickle(content: bytes) -> None:
    """Raise pickle.UnpicklingError if a pickle claims more data than it has.

    That is a length beyond the end of the file, or a memo index that a file of this size cannot reach.
    """
    marks = 0
    try:
        for opcode, argument, position in pickletools.genops(content):
            if opcode.name in _MEMO and int(argument or 0) > len(content):
                raise pickle.UnpicklingError(f"byte {position}: memo place {argument:,} in {len(content):,} bytes")
            if opcode.name == "FRAME" and int(argument or 0) > len(content) - (position or 0):
                raise pickle.UnpicklingError(f"byte {position}: a frame of {argument:,} in {len(content):,} bytes")
            if opcode.name == "MARK":
                marks += 1
                if marks > _DEEPEST + len(content) // 16:
                    raise pickle.UnpicklingError(f"byte {position}: {marks:,} marks")
    # genops raises these if a pickle is damaged
    except (ValueError, OverflowError, LookupError, struct.error) as error:
        raise pickle.UnpicklingError(str(error)) from None
