"""Write the drawings of docs/architecture.md: the rooms with what they import, and the way of a batch.

    python tools/draw_floors.py            write them
    python tools/draw_floors.py --check    exit with 1 if the page differs from the code

Both follow from the code: imports are read from the syntax trees, sentences from the docstrings of the types.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.architecture import FLOORS, PACKAGE, modules_of  # noqa: E402

PAGE = ROOT / "docs" / "architecture.md"
# (module, class or function) in the order in which a row passes them on its way to a metric
WAY_OF_A_BATCH = (
    ("prepare/run.py", "prepare"),
    ("data/dataset.py", "Dataset"),
    ("data/packing_index.py", "PackingIndex"),
    ("data/sampler.py", "ShuffledSampler"),
    ("data/blended_dataset.py", "BlendedDataset"),
    ("data/blended_dataset.py", "Row"),
    ("batching/objectives.py", "MaskingCollator"),
    ("batching/host.py", "HostBatch"),
    ("batching/loader.py", "load_batches"),
    ("batching/batches.py", "MicroBatch"),
    ("train/step.py", "train_step"),
    ("model/model.py", "EttinModel"),
    ("train/progress.py", "StepTotals"),
    ("train/progress.py", "StepResult"),
    ("train/hooks/metrics.py", "step_metrics"),
    ("metrics/record.py", "JsonlSink"),
)


def draw_rooms() -> str:
    """Draw one line a room, highest floor first, with the rooms that it imports."""
    used: dict[str, set[str]] = {room: set() for room in FLOORS}
    for module in modules_of(PACKAGE):
        for _, name in module.imports_of(PACKAGE):
            parts = name.split(".")
            if module.room in FLOORS and len(parts) > 1 and parts[1] in FLOORS and parts[1] != module.room:
                used[module.room].add(parts[1])
    width = max(map(len, FLOORS))
    lines = []
    for room, floor in sorted(FLOORS.items(), key=lambda item: (-item[1], item[0])):
        below = sorted(used[room], key=lambda name: (-FLOORS[name], name))
        line = f"{floor:>2}  {room:<{width}}  "
        first = line
        for name in below:
            if len(line) + len(name) > 104:
                lines.append(line.rstrip())
                line = " " * len(first)
            line += name + " "
        lines.append(line.rstrip())
    return "```\n" + "\n".join(lines) + "\n```"


def draw_way() -> str:
    """List the types and functions on the way of a batch with the first clause of each docstring."""
    rows = ["| step | in | what it is |", "|---|---|---|"]
    for path, name in WAY_OF_A_BATCH:
        tree = ast.parse((ROOT / PACKAGE / path).read_text(encoding="utf-8"))
        node = next(one for one in tree.body if getattr(one, "name", None) == name)
        summary = (ast.get_docstring(node) or "").split("\n\n")[0].replace("\n", " ")
        sentence = re.split(r"[.;:] |, and ", summary)[0].rstrip(".")
        rows.append(f"| `{name}` | `{path}` | {sentence} |")
    return "\n".join(rows)


def updated(page: str) -> str:
    """Return the page with both drawings made again from the code."""
    for name, drawing in (("rooms", draw_rooms()), ("way of a batch", draw_way())):
        begin, end = f"<!-- drawn: {name} -->\n", f"<!-- end of {name} -->"
        head, _, rest = page.partition(begin)
        page = f"{head}{begin}\n{drawing}\n\n{end}{rest.partition(end)[2]}"
    return page


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    page = PAGE.read_text(encoding="utf-8")
    drawn = updated(page)
    if parser.parse_args().check:
        return int(page != drawn)
    PAGE.write_text(drawn, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
