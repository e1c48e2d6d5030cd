"""A pickle read as data: dictionaries, lists, numbers, texts and descriptions of tensors. Nothing it asks for is run.

A pickle is a program that may call whatever it can name. Here every name leads to `Inert`, which takes any call and
does nothing, but for the few in `MEANINGS`; those are functions of this file. No module is imported, no class of torch
is made, and tensors stay descriptions, so the gigabytes of an optimizer cost nothing."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

from megatron_ettin.checkpoint.pickle_limits import check_pickle


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
