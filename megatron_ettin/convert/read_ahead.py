"""Tensors read by a few threads before they are asked for, within a bound of memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

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
