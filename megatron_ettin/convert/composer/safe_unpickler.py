"""Read a pickle as data: dictionaries, lists, numbers, texts and descriptions of tensors.

A pickle is a program that may call whatever it can name. `StubUnpickler` resolves every name to a `Stub`, which takes
any call and does nothing, except for the few names in `STAND_INS`, which lead to functions of this module. No module is
imported, no class of torch is made, and tensors stay descriptions, so the gigabytes of an optimizer cost nothing.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

from megatron_ettin.checkpoint.reader import check_pickle


class Stub:
    """Inert stand-in for a class, its instance or a function that a pickle names."""

    __slots__ = ()

    def __new__(cls, *args: Any, **kwargs: Any) -> Stub:
        """Accept any arguments."""
        return super().__new__(cls)

    def __call__(self, *args: Any) -> Any:
        """Do nothing, whatever the arguments are."""
        return self

    def _ignore(*args: Any) -> None:
        """Accept any arguments, also when called on the class without an instance."""

    # what a pickle may do to an object: set its state, items and members
    __setstate__ = __setitem__ = append = extend = add = _ignore


class StubFunction(Stub):
    """A function of this module as a pickle may call it; a pickle cannot change its attributes."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        """Call the function."""
        return self._function(*args)


class PlainDict(dict[Any, Any]):
    """An OrderedDict without its attributes: torch gives a state dict `_metadata`, another could give it an `items`."""

    __slots__ = ()

    def __setstate__(*args: Any) -> None:
        return None


class StorageRecord(NamedTuple):
    """A storage that was not read."""

    type_name: str
    """Name of the class that the pickle gives it, such as `FloatStorage`."""
    key: str
    """Name of the record in the zip file that holds the bytes."""
    items: int


class TensorRecord(NamedTuple):
    """A tensor that was not read: which items of which storage it has."""

    storage: StorageRecord
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def dtype(self) -> str:
        """Return the name of the class of its storage."""
        return self.storage.type_name


def _first(value: Any = None, *rest: Any) -> Any:
    """Return the first argument: torch.Size is its tuple, a parameter is the tensor in it."""
    return value


def _tensor(storage: Any = None, offset: Any = 0, shape: Any = (), stride: Any = (), *rest: Any) -> Any:
    """Describe a tensor; strange arguments give a stub."""
    well_formed = isinstance(shape, tuple) and isinstance(stride, tuple) and len(shape) == len(stride)
    if (
        isinstance(storage, StorageRecord)
        and well_formed
        and all(type(number) is int and 0 <= number < 1 << 62 for number in (offset, *shape, *stride))
    ):
        return TensorRecord(storage, offset, shape, stride)
    return Stub()


def _from_type(function: Any = None, tensor_class: Any = None, args: Any = (), *rest: Any) -> Any:
    """Describe a tensor with attributes: how to rebuild it, its class, the arguments, the attributes."""
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
    """An unpickler that knows tensors and dictionaries; every other name is a stub."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in for a name; of a class of storages the name itself."""
        if module in ("torch", "torch.cuda", "torch.storage") and name.endswith("Storage"):
            return name
        return STAND_INS.get((module, name), Stub)

    def persistent_load(self, saved: Any) -> Any:
        """Describe a storage, the only thing that torch.save keeps outside of the pickle."""
        match saved:
            case ("storage", str(name), str(key), _, int(items)) if type(saved) is tuple:
                return StorageRecord(name, key, items)
        return Stub()


def read_pickle(content: bytes) -> Any:
    """Return the tree of a pickle. Raises ValueError for one that is damaged or claims to be larger than it is."""
    try:
        check_pickle(content)
        return StubUnpickler(io.BytesIO(content)).load()
    except Exception as error:
        # a damaged pickle may fail in any way
        raise ValueError(f"{type(error).__name__}: {error}") from None
