"""Memory maps of files that are read a little at a time, at places all over them.

A page that is not in memory brings the file system's whole read-ahead with it, 128 KiB on many machines and megabytes
on some: a look-up of 8 bytes then costs a millisecond, and the process seems to hold the file. Advice keeps it to the
page. Whoever reads a file from end to end opens it in the ordinary way instead."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import numpy.typing as npt


def map_scattered(path: Path, dtype: npt.DTypeLike) -> npt.NDArray:
    """The file as a read-only array of `dtype` [n] for reading at random places. Raises OSError."""
    with open(path, "rb") as stream:
        stream.seek(0, 2)
        size = stream.tell()
        if size == 0:
            return np.zeros(0, dtype)
        mapped = mmap.mmap(stream.fileno(), size, access=mmap.ACCESS_READ)
    mapped.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(mapped, dtype, size // np.dtype(dtype).itemsize)


def map_npy(path: Path) -> npt.NDArray:
    """The array of an .npy file, for reading at random places."""
    mapped = np.load(path, mmap_mode="r")
    if mapped.size:
        mapped._mmap.madvise(mmap.MADV_RANDOM)
    return np.asarray(mapped)


def map_in_order(path: Path, dtype: npt.DTypeLike) -> npt.NDArray:
    """The same for reading from end to end."""
    return np.asarray(np.memmap(path, dtype, "r")) if path.stat().st_size else np.zeros(0, dtype)
