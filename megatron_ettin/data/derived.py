"""Check the files of a dataset that its manifest does not list: packing indices, compiled orders, inputs.json."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.parsing import DIGEST, checked_digest, load_json
from megatron_ettin.base.paths import path_in
from megatron_ettin.data import packing_index
from megatron_ettin.data.manifest import INPUTS_FILE, FileRecord
from megatron_ettin.data.packing_index import PackingRecord
from megatron_ettin.data.replay import recorded
from megatron_ettin.data.replay.recorded import OrderRecord
from megatron_ettin.data.verify import Expected

REMEDY = " (remove its folder: it is built again)"


def derived_files(folder: Path) -> Iterator[Expected]:
    """Yield the files of a dataset's packing indices and compiled orders as their records have them.

    inputs.json is yielded if it is damaged.
    """
    yield from damaged_input_list(folder)
    indices = sorted(folder.glob(f"*_*/{packing_index.RECORD_FILE}"))
    orders = sorted(folder.glob(f"order_*/{recorded.RECORD_FILE}"))
    readers: list[tuple[Path, Callable[[Path], PackingRecord | OrderRecord]]]
    readers = [*((file, PackingRecord.read) for file in indices), *((file, OrderRecord.read) for file in orders)]
    for record_file, read in readers:
        try:
            records = read(record_file.parent).files
            paths = {name: path_in(record_file.parent, name, record_file) for name in records}
        except UserError as error:
            yield Expected(record_file, FileRecord(0, ""), remedy=REMEDY, problem=str(error))
            continue
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            problem = f"damaged ({type(error).__name__})"
            yield Expected(record_file, FileRecord(0, ""), remedy=REMEDY, problem=problem)
            continue
        yield from (Expected(paths[name], record, remedy=REMEDY) for name, record in records.items())


def damaged_input_list(folder: Path) -> Iterator[Expected]:
    """Yield inputs.json of a dataset if it is not as it was written."""
    path = folder / INPUTS_FILE
    try:
        raw = load_json(path.read_text(encoding="utf-8"))
        if DIGEST not in raw:
            raise ValueError(f"it has no {DIGEST}")
        checked_digest(raw)
    except FileNotFoundError:
        return
    except (OSError, ValueError, TypeError, AttributeError) as error:
        remedy = " (remove it: `ettin prepare` then compares names and sizes of its inputs alone)"
        yield Expected(path, FileRecord(0, ""), remedy=remedy, problem=f"damaged ({error})")
