"""Check the files of a dataset's folder that its manifest does not list: row plans, compiled orders, inputs.json."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.parsing import DIGEST, checked_digest, load_json
from megatron_ettin.base.paths import path_in
from megatron_ettin.data.manifest import INPUTS_FILE, FileRecord
from megatron_ettin.data.packing_index import PLAN_FILE, packing_record
from megatron_ettin.data.replay.recorded import RECORD_FILE, order_record
from megatron_ettin.data.verify import Expected

REMEDY = " (remove its folder: it is built again)"


def derived_files(folder: Path) -> Iterator[Expected]:
    """The files of the row plans and compiled orders beside a dataset, as their records have them, and the list of its
    inputs where it is damaged."""
    yield from damaged_input_list(folder)
    plans, orders = sorted(folder.glob(f"*_*/{PLAN_FILE}")), sorted(folder.glob(f"order_*/{RECORD_FILE}"))
    for record_file in [*plans, *orders]:
        try:
            read = packing_record if record_file.name == PLAN_FILE else order_record
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
    """Yield inputs.json of a dataset if it is not what was written."""
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
