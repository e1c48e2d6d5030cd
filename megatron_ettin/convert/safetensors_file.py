"""Safetensors files written one tensor at a time and read one tensor at a time.

The library's writer wants all tensors of a file at once. The format is a length, a JSON header and the bytes in order,
so with shapes known beforehand a file of any size is written in the memory of its largest tensor.

Tensors read by a few threads before they are asked for, within a bound of memory."""

from __future__ import annotations

import contextlib
import json
import math
import os
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.parsing import load_json
from megatron_ettin.convert.folders import hf_file

NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FORCED_BYTES = 256 << 20
Entry = tuple[str, tuple[int, ...]]


def plan_shards(entries: Sequence[Entry], item_bytes: int, max_shard_bytes: int) -> list[list[Entry]]:
    """Consecutive entries in files of at most `max_shard_bytes` (a larger tensor gets a file of its own)."""
    shards: list[list[Entry]] = [[]]
    used_bytes = 0
    for name, shape in entries:
        size_bytes = math.prod(shape) * item_bytes
        if shards[-1] and used_bytes + size_bytes > max_shard_bytes:
            shards.append([])
            used_bytes = 0
        shards[-1].append((name, shape))
        used_bytes += size_bytes
    return shards


def write_file(path: Path, entries: Sequence[Entry], dtype: torch.dtype, tensors: Iterator[torch.Tensor]) -> int:
    """Write the next tensors of `tensors` as `entries`, in order. Returns the bytes of the tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in entries:
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file, _forced_meanwhile(file) as written:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in entries:
            tensor = next(tensors)
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name}: shape {tuple(tensor.shape)}, planned {shape}")
            file.write(tensor.to(dtype).contiguous().view(torch.uint8).reshape(-1).numpy().data)
            written(tensor.nbytes)
    return offset


@contextlib.contextmanager
def _forced_meanwhile(file: BinaryIO) -> Iterator[Callable[[int], None]]:
    """Let the disk write while more is computed: every FORCED_BYTES that `written` is told of go to it in a thread, and
    the rest at the end. The system itself would begin when a tenth of the memory is full."""
    unforced = 0
    running: Future[None] | None = None

    def written(count: int) -> None:
        nonlocal unforced, running
        unforced += count
        if unforced >= FORCED_BYTES and (running is None or running.done()):
            if running is not None:
                running.result()
            file.flush()
            running, unforced = disk.submit(os.fdatasync, file.fileno()), 0

    with ThreadPoolExecutor(1, "disk") as disk:
        yield written
        if running is not None:
            running.result()
        file.flush()
        os.fsync(file.fileno())


def write_model(
    folder: Path, entries: Sequence[Entry], dtype: torch.dtype, tensors: Iterator[torch.Tensor], max_shard_bytes: int
) -> list[str]:
    """model.safetensors, or numbered shards and their index. Returns the file names."""
    shards = plan_shards(entries, dtype.itemsize, max_shard_bytes)
    if len(shards) == 1:
        write_file(folder / SINGLE, shards[0], dtype, tensors)
        return [SINGLE]
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    total_bytes = sum(write_file(folder / name, shard, dtype, tensors) for name, shard in zip(names, shards))
    weight_map = {entry[0]: name for name, shard in zip(names, shards) for entry in shard}
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return names


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies and what its file's header says of it."""

    path: Path
    shape: tuple[int, ...]
    dtype: str


class ModelFiles:
    """The tensors of a Hugging Face folder by name, whether in one file or in shards.

    The library maps a whole file into memory; it is mapped anew for each tensor, so that pages read are let go."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.tensors: dict[str, Stored] = {}
        for path, expected in self._files().items():
            with _opened(path) as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                found = {name: Stored(path, tuple(s.get_shape()), str(s.get_dtype())) for name, s in slices.items()}
            missing = sorted((expected or set()) - set(found))
            if missing:
                raise UserError(f"{path}: lacks {missing[0]}, which the index places there")
            self.tensors |= found

    def _files(self) -> dict[Path, set[str] | None]:
        """Every file to open and the names that the index places in it (None without an index)."""
        index, single = self._folder / INDEX, self._folder / SINGLE
        if not index.is_file():
            if single.is_file():
                return {hf_file(self._folder, SINGLE, self._folder): None}
            legacy = next(iter(sorted(self._folder.glob("*.bin"))), None)
            hint = f"; {legacy.name} is a pickle, which is not read: save it as safetensors" if legacy else ""
            raise UserError(f"{self._folder}: neither {SINGLE} nor {INDEX}{hint}")
        files: dict[Path, set[str] | None] = {}
        try:
            weight_map = load_json(index.read_text(encoding="utf-8"))["weight_map"]
            for name, file in weight_map.items():
                names = files.setdefault(hf_file(self._folder, file, index), set())
                assert names is not None
                names.add(name)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index}: unreadable ({error})") from None
        return files

    def read(self, name: str) -> torch.Tensor:
        with _opened(self.tensors[name].path) as file:
            return file.get_tensor(name)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    if not os.path.isfile(path):  # which takes a name that no file system does for a missing one
        raise UserError(f"{path}: missing; {INDEX} names it"[:600])
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: truncated or no safetensors file ({error})") from None


Item = TypeVar("Item")
Read = TypeVar("Read")
READERS = 2  # at once; more take turns at the same memory bus
AHEAD_BYTES = 64 << 20  # of items read before they are asked for; a larger one is read when it is


def read_ahead(
    items: Iterable[Item], bytes_of: Callable[[Item], int], read: Callable[[Item], Read]
) -> Iterator[tuple[Item, Read]]:
    """(item, read(item)) in order. Raises what `read` raises."""
    waiting: deque[tuple[Item, int, Future[Read]]] = deque()
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
