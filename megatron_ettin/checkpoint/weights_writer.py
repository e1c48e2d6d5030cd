"""Write a weights-only torch_dist checkpoint from one process, one tensor in memory at a time.

Core's save needs process groups and all tensors in memory. The format underneath is plain: torch.save of each
tensor at an offset of a .distcp file, and `.metadata` saying where. Written here directly, it is read by core's
dist_checkpointing.load at any layout, and an import needs the memory of its largest tensor only.
"""

from __future__ import annotations

import errno
import json
import pickle
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_ettin.base.digests import Entry, integrity_entry
from megatron_ettin.base.files import fsync

# a .distcp file is closed once it is larger, and hashed while the next is written
FILE_BYTES = 256 << 20
FORMAT = {
    **{"sharded_backend": "torch_dist", "sharded_backend_version": 1},
    **{"common_backend": "torch", "common_backend_version": 1},
}


def write_weights(
    staging: Path, tensors: Iterable[tuple[str, torch.Tensor]], common: dict[str, Any], file_bytes: int = FILE_BYTES
) -> dict[str, Entry]:
    """Write unsharded tensors under their canonical names, and `common` (plain types), into a folder.

    Returns the integrity entries of the .distcp files, by name. Each file is hashed while the next one is written.
    """
    staging = Path(staging)
    staging.mkdir(parents=True, exist_ok=True)
    entries: dict[str, Any] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    file, name = None, ""
    hash_pool = ThreadPoolExecutor(1, "hash")
    hashed: dict[str, Future[Entry]] = {}

    def close() -> None:
        if file is not None:
            file.close()
            hashed[name] = hash_pool.submit(_hash_and_fsync, staging / name)

    try:
        for key, tensor in tensors:
            if file is None or file.tell() >= file_bytes:
                close()
                name = f"__0_{len({info.relative_path for info in storage.values()})}.distcp"
                file = open(staging / name, "wb")  # noqa: SIM115
            tensor = tensor.detach().cpu().contiguous().clone() if _is_view(tensor) else tensor.detach().cpu()
            first = file.tell()
            save_tensor(tensor, file)
            corner = torch.Size([0] * tensor.dim())
            entries[key] = TensorStorageMetadata(
                TensorProperties(dtype=tensor.dtype), tensor.shape, [ChunkStorageMetadata(corner, tensor.shape)]
            )
            storage[MetadataIndex(key, corner, 0)] = _StorageInfo(name, first, file.tell() - first)
    finally:
        close()
        hash_pool.shutdown()
    _write_metadata(staging, entries, storage)
    torch.save(common, staging / "common.pt")
    (staging / "metadata.json").write_text(json.dumps(FORMAT) + "\n", encoding="utf-8")
    return {name: entry.result() for name, entry in hashed.items()}


def _hash_and_fsync(path: Path) -> Entry:
    entry = integrity_entry(path)
    fsync(path)
    return entry


def save_tensor(tensor: torch.Tensor, file: BinaryIO) -> None:
    """Call torch.save, and raise OSError on a full disk, which torch reports as an error of its zip writer.

    The zip's own checksums are left out: no reader of checkpoints looks at them, and integrity.json has better ones.
    """
    previous = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(tensor, file)
        file.flush()
    except RuntimeError as error:
        cause = error.__context__
        raise cause if isinstance(cause, OSError) else OSError(errno.ENOSPC, f"not written whole: {error}") from None
    finally:
        torch.serialization.set_crc32_options(previous)


def _is_view(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is a view. torch.save would write the whole storage of a view."""
    return not tensor.is_contiguous() or tensor.untyped_storage().nbytes() != tensor.nbytes


def _write_metadata(staging: Path, entries: dict[str, Any], storage: dict[MetadataIndex, _StorageInfo]) -> None:
    metadata = Metadata(entries, storage_data=storage, storage_meta=StorageMeta())
    metadata.version = CURRENT_DCP_VERSION
    with open(staging / ".metadata", "wb") as out:
        pickle.dump(metadata, out)
