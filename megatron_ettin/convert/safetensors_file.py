"""Write and read safetensors files one tensor at a time.

The library's writer needs all tensors of a file at once. The format is a length, a JSON header and the bytes in order.
If the shapes are known beforehand, writing a file of any size needs only the memory of its largest tensor.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import struct
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.parsing import load_json
from megatron_ettin.convert.folders import hf_file

DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLUSH_BYTES = 256 << 20
"""Bytes after whose writing a thread syncs the file to the disk."""
TensorSpec = tuple[str, tuple[int, ...]]
"""(name, shape)."""

Item = TypeVar("Item")
Result = TypeVar("Result")
READERS = 2
"""Threads that read ahead; the memory bandwidth limits more of them."""
AHEAD_BYTES = 64 << 20
"""Most memory of items that are read ahead; a larger item is read only when it is the next."""


def plan_shards(specs: Sequence[TensorSpec], item_bytes: int, max_shard_bytes: int) -> list[list[TensorSpec]]:
    """Group consecutive tensors into files of at most `max_shard_bytes`; a larger tensor gets a separate file."""
    shards: list[list[TensorSpec]] = [[]]
    used_bytes = 0
    for name, shape in specs:
        size_bytes = math.prod(shape) * item_bytes
        if shards[-1] and used_bytes + size_bytes > max_shard_bytes:
            shards.append([])
            used_bytes = 0
        shards[-1].append((name, shape))
        used_bytes += size_bytes
    return shards


def write_file(path: Path, specs: Sequence[TensorSpec], dtype: torch.dtype, tensors: Iterator[torch.Tensor]) -> int:
    """Write one safetensors file.

    Args:
        path: the file.
        specs: names and shapes of its tensors, in order.
        dtype: type to store them in.
        tensors: iterator over the tensors; as many as `specs` has are taken.

    Returns:
        Bytes of the tensors, without the header.

    Raises:
        ValueError: a tensor has another shape than planned.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in specs:
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file, _flushed_in_background(file) as written:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in specs:
            tensor = next(tensors)
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name}: shape {tuple(tensor.shape)}, planned {shape}")
            file.write(tensor.to(dtype).contiguous().view(torch.uint8).reshape(-1).numpy().data)
            written(tensor.nbytes)
    return offset


@contextlib.contextmanager
def _flushed_in_background(file: BinaryIO) -> Iterator[Callable[[int], None]]:
    """Yield a function to call after each write with its bytes; after every FLUSH_BYTES a thread syncs the file.

    The rest is synced at the end. The kernel by itself would begin to write only when a tenth of the memory is dirty.
    """
    unflushed = 0
    running: Future[None] | None = None

    def written(count: int) -> None:
        nonlocal unflushed, running
        unflushed += count
        if unflushed >= FLUSH_BYTES and (running is None or running.done()):
            if running is not None:
                running.result()
            file.flush()
            running, unflushed = disk.submit(os.fdatasync, file.fileno()), 0

    with ThreadPoolExecutor(1, "disk") as disk:
        yield written
        if running is not None:
            running.result()
        file.flush()
        os.fsync(file.fileno())


def write_model(
    folder: Path, specs: Sequence[TensorSpec], dtype: torch.dtype, tensors: Iterator[torch.Tensor], max_shard_bytes: int
) -> list[str]:
    """Write model.safetensors, or numbered shards and their index. Returns the names of the safetensors files."""
    shards = plan_shards(specs, dtype.itemsize, max_shard_bytes)
    if len(shards) == 1:
        write_file(folder / SINGLE, shards[0], dtype, tensors)
        return [SINGLE]
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    total_bytes = sum(write_file(folder / name, shard, dtype, tensors) for name, shard in zip(names, shards))
    weight_map = {spec[0]: name for name, shard in zip(names, shards) for spec in shard}
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return names


@dataclass(frozen=True)
class StoredTensor:
    """Header entry of a tensor in a safetensors file."""

    path: Path
    shape: tuple[int, ...]
    dtype: str
    """Type in the format's notation, such as F32."""


class ModelFiles:
    """Tensors of a Hugging Face folder by name, in one file or in shards.

    The library maps a whole file into memory. Each read opens the file again, so that its pages are released.
    """

    reads_ahead = True
    """Whether threads may read tensors ahead."""

    def __init__(self, folder: Path) -> None:
        """Read the headers. Raises UserError if a file is missing or damaged, or lacks a tensor of the index."""
        self.path = folder
        self.dtypes: Collection[str] = DTYPE_NAMES.values()
        self.tensors: dict[str, StoredTensor] = {}
        for path, expected in self._files().items():
            with _opened(path) as file:
                for name in file.keys():  # noqa: SIM118
                    header = file.get_slice(name)
                    self.tensors[name] = StoredTensor(path, tuple(header.get_shape()), str(header.get_dtype()))
                missing = sorted(expected - set(file.keys()))
            if missing:
                raise UserError(f"{path}: lacks {missing[0]}, which the index places there")

    def _files(self) -> dict[Path, set[str]]:
        """Return file -> names that the index places in it (empty set without an index). Raises UserError."""
        index, single = self.path / INDEX, self.path / SINGLE
        if not index.is_file():
            if single.is_file():
                return {hf_file(self.path, SINGLE, self.path): set()}
            legacy = next(iter(sorted(self.path.glob("*.bin"))), None)
            hint = f"; {legacy.name} is a pickle, which is not read: save it as safetensors" if legacy else ""
            raise UserError(f"{self.path}: neither {SINGLE} nor {INDEX}{hint}")
        files: dict[Path, set[str]] = {}
        try:
            weight_map = load_json(index.read_text(encoding="utf-8"))["weight_map"]
            for name, file in weight_map.items():
                files.setdefault(hf_file(self.path, file, index), set()).add(name)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index}: unreadable ({error})") from None
        return files

    def read(self, name: str) -> torch.Tensor:
        """Read a tensor by its Hugging Face name."""
        with _opened(self.tensors[name].path) as file:
            tensor: torch.Tensor = file.get_tensor(name)
            return tensor

    def display_name(self, name: str) -> str:
        """Return the name of a tensor for messages: the name itself."""
        return name


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    # unlike Path.is_file, os.path.isfile returns False for a name that is too long or invalid
    if not os.path.isfile(path):
        raise UserError(f"{path}: missing; {INDEX} names it"[:600])
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: truncated or no safetensors file ({error})") from None


def read_ahead(
    items: Iterable[Item], bytes_of: Callable[[Item], int], read: Callable[[Item], Result]
) -> Iterator[tuple[Item, Result]]:
    """Yield (item, read(item)) in order; READERS threads read following items ahead.

    `bytes_of` returns the memory of an item's result. Results that are read ahead take at most AHEAD_BYTES in all.
    """
    waiting: deque[tuple[Item, int, Future[Result]]] = deque()
    rest, ahead_bytes = deque(items), 0
    with ThreadPoolExecutor(READERS, "read ahead") as pool:
        while rest or waiting:
            while rest and (not waiting or ahead_bytes + bytes_of(rest[0]) <= AHEAD_BYTES):
                item = rest.popleft()
                waiting.append((item, bytes_of(item), pool.submit(read, item)))
                ahead_bytes += bytes_of(item)
            item, size_bytes, reading = waiting.popleft()
            yield item, reading.result()
            ahead_bytes -= size_bytes
