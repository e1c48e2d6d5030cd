"""The rules of docs/architecture.md, executable: each reads the syntax trees of the package and names every breach.

A rule is a function from one module (its path in the package, its tree, its text) to breaches; `BREACHES` proves that
each rule catches what it is for."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "megatron_ettin"
FLOORS = {
    "base": 0,
    "config": 1,
    **dict.fromkeys(("platform", "metrics"), 2),
    "parallel": 3,
    **dict.fromkeys(("data", "model", "optim", "checkpoint"), 4),
    **dict.fromkeys(("batching", "prepare", "convert", "plan", "doctor"), 5),
    "runs": 6,
    **dict.fromkeys(("release", "report", "launch"), 7),
    **dict.fromkeys(("train", "faults", "evaluate", "bench"), 8),
    **dict.fromkeys(("cli", "api"), 9),
    "__main__": 10,
}
# its rooms work together; no module of theirs may import another that imports it
OPEN_FLOOR = 8
MEGATRON_ROOMS = {"parallel", "platform", "model", "optim", "checkpoint", "train", "faults", "evaluate", "bench"}
# what a run calls while it trains
WHILE_TRAINING = {
    *("train", "faults", "evaluate", "runs", "metrics", "platform", "parallel"),
    *("data", "model", "batching", "optim", "checkpoint"),
}
PRINTING = {"stdout", "stderr", "__stdout__", "__stderr__", "print_exc", "print_exception", "print_stack", "warn"}
EMPTY_NAMES = {"utils", "util", "helpers", "helper", "common", "misc"}
DEVICE_NAMES = {"nccl", "gloo", "cuda"}
MOST_FILE_LINES, MOST_FUNCTION_LINES = 400, 60


@dataclass(frozen=True)
class Module:
    path: str
    """Path relative to the package, such as "data/packing_index.py"."""
    text: str

    @functools.cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @functools.cached_property
    def nodes(self) -> list[ast.AST]:
        """List every node of the tree."""
        return list(ast.walk(self.tree))

    @property
    def room(self) -> str:
        """Return the package or top-level module that it is part of: "data", "metrics"."""
        return self.path.partition("/")[0].removesuffix(".py")

    def imports(self, nodes: ast.AST | None = None) -> Iterator[tuple[int, str]]:
        """Yield (line, dotted name) of every import, also function-local, relative and `import_module("...")` ones."""
        here = [PACKAGE, *self.path.split("/")]
        for node in ast.walk(nodes) if nodes else self.nodes:
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = [*here[: len(here) - node.level], *filter(None, [node.module])] if node.level else [node.module]
                yield from ((node.lineno, ".".join([*map(str, base), alias.name])) for alias in node.names)
            elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
                called = getattr(node.func, "attr", getattr(node.func, "id", ""))
                if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                    yield node.lineno, node.args[0].value

    @functools.cached_property
    def all_imports(self) -> list[tuple[int, str]]:
        return list(self.imports())

    def imports_of(self, *packages: str) -> Iterator[tuple[int, str]]:
        for line, name in self.all_imports:
            if any(name == package or name.startswith(package + ".") for package in packages):
                yield line, name


def imports_only_from_floors_below(module: Module) -> Iterator[str]:
    own = FLOORS.get(module.room, -1)  # the package's __init__ may import nothing from the package
    for line, name in module.imports_of(PACKAGE):
        parts = name.split(".")
        target = parts[1] if len(parts) > 1 else ""
        if target not in FLOORS or target == module.room:
            continue  # the package's own names, such as __version__, or its own room
        if FLOORS[target] > own or (FLOORS[target] == own and own != OPEN_FLOOR):
            yield f"line {line}: {module.room} (floor {own}) imports {name} (floor {FLOORS[target]})"


def every_room_has_a_floor(module: Module) -> Iterator[str]:
    if module.room not in {*FLOORS, "__init__"}:
        yield f"{module.room} has no floor; DESIGN says which"


def no_torch_on_the_lowest_floors(module: Module) -> Iterator[str]:
    if module.room in ("base", "config"):
        yield from (f"line {line}: imports {name}" for line, name in module.imports_of("torch", "megatron"))


def no_torch_when_metrics_is_imported(module: Module) -> Iterator[str]:
    if module.room == "metrics":
        outside = ast.Module([node for node in module.tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])
        for line, name in module.imports(outside):
            if name.split(".")[0] in ("torch", "wandb", "tensorboard"):
                yield f"line {line}: imports {name} at module level"


def device_names_only_in_platform(module: Module) -> Iterator[str]:
    if module.room == "platform":
        return
    for line, name in module.imports():
        if "transformer_engine" in name.split(".") or name.startswith(("torch.cuda", "torch.backends.cuda")):
            yield f"line {line}: imports {name}"
    for node in (node for node in module.nodes if hasattr(node, "lineno")):
        if isinstance(node, ast.Attribute) and node.attr == "cuda":
            yield f"line {node.lineno}: .cuda"
        text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
        if text.partition(":")[0] in DEVICE_NAMES and " " not in text:
            yield f"line {node.lineno}: {text!r}"


def transformers_only_in_convert_and_tokenizer(module: Module) -> Iterator[str]:
    if module.room != "convert" and module.path != "data/tokenizer.py":
        yield from (f"line {line}: imports {name}" for line, name in module.imports_of("transformers"))


def dashboards_only_in_metrics(module: Module) -> Iterator[str]:
    if module.room != "metrics":
        dashboards = ("wandb", "tensorboard", "tensorboardX", "torch.utils.tensorboard")
        yield from (f"line {line}: imports {name}" for line, name in module.imports_of(*dashboards))


def megatron_only_where_it_is_wrapped(module: Module) -> Iterator[str]:
    if module.room not in MEGATRON_ROOMS:
        yield from (f"line {line}: imports {name}" for line, name in module.imports_of("megatron"))


def global_groups_only_in_parallel(module: Module) -> Iterator[str]:
    if module.path == "parallel/groups.py":
        return
    for line, name in module.imports_of("megatron"):
        if "parallel_state" in name.split(".") or name == "megatron.core.mpu":
            yield f"line {line}: imports {name}"
    for node in module.nodes:
        if isinstance(node, ast.Attribute) and node.attr in ("parallel_state", "mpu"):
            yield f"line {node.lineno}: .{node.attr}"


def never_megatron_training(module: Module) -> Iterator[str]:
    yield from (f"line {line}: imports {name}" for line, name in module.imports_of("megatron.training"))


def lines_only_through_the_run_log(module: Module) -> Iterator[str]:
    """What prints in another way can end a run whose log cannot be written."""
    if module.room not in WHILE_TRAINING:
        return
    for node in module.nodes:
        if isinstance(node, ast.Name) and node.id == "print":
            yield f"line {node.lineno}: print"
        owner = node.value if isinstance(node, ast.Attribute) else None
        if isinstance(owner, ast.Name) and owner.id in ("sys", "traceback", "warnings") and node.attr in PRINTING:
            yield f"line {node.lineno}: {owner.id}.{node.attr}"
        draws = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Live"
        if draws and "console" not in {word.arg for word in node.keywords}:
            yield f"line {node.lineno}: rich draws on standard output itself"


def short_files(module: Module) -> Iterator[str]:
    lines = len(module.text.splitlines())
    if lines > MOST_FILE_LINES:
        yield f"{lines} lines; at most {MOST_FILE_LINES}"


def short_functions(module: Module) -> Iterator[str]:
    for node in module.nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MOST_FUNCTION_LINES:
                yield f"line {node.lineno}: {node.name} has {lines} lines; at most {MOST_FUNCTION_LINES}"


def names_from_files_become_paths_in_one_place(module: Module) -> Iterator[str]:
    """Follow what is read of a file through the assignments and loops of each function to `/`, `with_name` and `join`.

    What a function is given as an argument is not followed, only its fields that hold names (`NAME_FIELDS`)."""
    if module.path in ("base/paths.py", "prepare/filesystem.py"):
        return
    functions = [node for node in module.tree.body if not isinstance(node, ast.ClassDef)]
    functions += [part for node in module.tree.body if isinstance(node, ast.ClassDef) for part in node.body]
    for function in functions:
        nodes = list(ast.walk(function))
        read = names_read(nodes)
        for node in nodes:
            joins = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div)
            if joins and is_read(node.right, read) and not is_read(node.left, read):
                yield f"line {node.lineno}: {ast.unparse(node)}; path_in joins names from files"
            called = getattr(node.func, "attr", getattr(node.func, "id", "")) if isinstance(node, ast.Call) else ""
            if called in ("with_name", "joinpath", "join", "joined") and any(is_read(one, read) for one in node.args):
                is_path = called != "join" or ast.unparse(node.func) == "os.path.join"
                if is_path:
                    yield f"line {node.lineno}: {ast.unparse(node)}; path_in joins names from files"


NAME_SOURCES = {
    *("load_json", "load_yaml", "loads", "json_object", "read_text", "read_record", "read_entries", "read_manifest"),
    *("manifest_from", "plan_record", "order_record", "read_metadata", "file_records", "read_progress", "read_config"),
}
NAME_FIELDS = {"files", "tokenizer_files", "shards", "storage_data", "relative_path", "fingerprint"}
NAME_CHECKS = {
    "path_in",
    "joined_in",
    "shard_file",
    "file_of",
    "file_in",
    "hf_file",
    "checked_name",
    "hexdigest",
    "len",
}


def is_read(node: ast.AST, read: set[str]) -> bool:
    """Whether an expression holds something out of a file; what has been checked does not count."""
    if isinstance(node, ast.Call):
        called = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if called in NAME_CHECKS:
            return False
        if called in NAME_SOURCES:
            return True
    if isinstance(node, ast.Attribute) and node.attr in NAME_FIELDS:
        return True
    if isinstance(node, ast.Name) and node.id in read:
        return True
    return any(is_read(child, read) for child in ast.iter_child_nodes(node))


def names_read(nodes: list[ast.AST]) -> set[str]:
    """Variables of a function that hold something out of a file."""
    read: set[str] = set()
    while True:
        before = len(read)
        for node in nodes:
            if isinstance(node, ast.Assign):
                targets, value = node.targets, node.value
            elif isinstance(node, ast.AnnAssign | ast.NamedExpr | ast.AugAssign) and node.value is not None:
                targets, value = [node.target], node.value
            elif isinstance(node, ast.For | ast.comprehension):
                targets, value = [node.target], node.iter
            else:
                continue
            if is_read(value, read):
                names = [one for target in targets for one in ast.walk(target) if isinstance(one, ast.Name)]
                read |= {one.id for one in names if isinstance(one.ctx, ast.Store)}
        if len(read) == before:
            return read


def names_that_say_something(module: Module) -> Iterator[str]:
    for part in module.path.removesuffix(".py").split("/"):
        if EMPTY_NAMES & set(part.split("_")):
            yield f"{part!r} says nothing of what is inside"
    for node in module.nodes:
        if isinstance(node, ast.ClassDef) and node.name.endswith("Manager"):
            yield f"line {node.lineno}: class {node.name}"


IN_THE_PACKAGE = [
    imports_only_from_floors_below,
    every_room_has_a_floor,
    no_torch_on_the_lowest_floors,
    no_torch_when_metrics_is_imported,
    device_names_only_in_platform,
    transformers_only_in_convert_and_tokenizer,
    dashboards_only_in_metrics,
    megatron_only_where_it_is_wrapped,
    global_groups_only_in_parallel,
    never_megatron_training,
    lines_only_through_the_run_log,
    names_from_files_become_paths_in_one_place,
]
EVERYWHERE = [short_files, short_functions, names_that_say_something]


@functools.cache
def modules_of(folder: str) -> list[Module]:
    """Read the files of a folder; each is parsed once for all rules."""
    base = ROOT / folder
    files = sorted(base.rglob("*.py"))
    return [Module(path.relative_to(base).as_posix(), path.read_text(encoding="utf-8")) for path in files]


def modules(*folders: str) -> list[Module]:
    return [module for folder in folders for module in modules_of(folder)]


@pytest.mark.parametrize("rule", [*IN_THE_PACKAGE, *EVERYWHERE], ids=lambda rule: rule.__name__)
def test_architecture_rule_has_no_breach(rule):
    checked = modules(PACKAGE) if rule in IN_THE_PACKAGE else modules(PACKAGE, "examples", "tools")
    assert len(checked) > 10
    assert [f"{module.path}: {breach}" for module in checked for breach in rule(module)] == []


BREACHES = [
    (imports_only_from_floors_below, "config/a.py", "from megatron_ettin.metrics import FanOut"),
    (imports_only_from_floors_below, "model/a.py", "def f():\n    import megatron_ettin.data.packing_index"),
    (imports_only_from_floors_below, "metrics/a.py", "from megatron_ettin import parallel"),
    (imports_only_from_floors_below, "data/a.py", "from ..model import build"),
    (imports_only_from_floors_below, "train/a.py", "import_module('megatron_ettin.cli')"),
    (every_room_has_a_floor, "extra/a.py", ""),
    (no_torch_on_the_lowest_floors, "config/a.py", "def f():\n    from torch import nn"),
    (no_torch_when_metrics_is_imported, "metrics/a.py", "from torch.utils.tensorboard import SummaryWriter"),
    (device_names_only_in_platform, "train/a.py", "import torch\ntorch.cuda.synchronize()"),
    (device_names_only_in_platform, "train/a.py", "from torch.cuda import Event"),
    (device_names_only_in_platform, "model/a.py", "import transformer_engine.pytorch as te"),
    (device_names_only_in_platform, "model/a.py", "from megatron.core.extensions.transformer_engine import TENorm"),
    (device_names_only_in_platform, "train/a.py", "init(backend='nccl')"),
    (device_names_only_in_platform, "train/a.py", "device = 'cuda:0'"),
    (device_names_only_in_platform, "train/a.py", "device = f'cuda:{rank}'"),
    (device_names_only_in_platform, "train/a.py", "weights.cuda()"),
    (transformers_only_in_convert_and_tokenizer, "data/packing_index.py", "from transformers import AutoTokenizer"),
    (dashboards_only_in_metrics, "train/a.py", "from torch.utils import tensorboard"),
    (dashboards_only_in_metrics, "train/a.py", "import wandb"),
    (megatron_only_where_it_is_wrapped, "data/a.py", "from megatron.core.datasets import indexed_dataset"),
    (global_groups_only_in_parallel, "train/a.py", "from megatron.core import parallel_state as ps"),
    (global_groups_only_in_parallel, "model/a.py", "from megatron.core.parallel_state import get_tensor_rank"),
    (global_groups_only_in_parallel, "optim/a.py", "import megatron.core as core\ncore.parallel_state.destroy()"),
    (never_megatron_training, "train/a.py", "from megatron.training import get_args"),
    (lines_only_through_the_run_log, "train/a.py", "print('step 1')"),
    (lines_only_through_the_run_log, "data/a.py", "def copy(tell=print): ..."),
    (lines_only_through_the_run_log, "metrics/a.py", "import sys\nsys.stderr.write('x')"),
    (
        lines_only_through_the_run_log,
        "parallel/failure_report.py",
        "import traceback\ntraceback.print_exception(error)",
    ),
    (lines_only_through_the_run_log, "train/a.py", "from rich.live import Live\nLive(bar)"),
    (
        names_from_files_become_paths_in_one_place,
        "data/a.py",
        "def f(folder):\n    for shard in manifest.shards:\n        open(folder / (shard.name + '.bin'))",
    ),
    (
        names_from_files_become_paths_in_one_place,
        "convert/a.py",
        "def f(path):\n    raw = load_json(path.read_text())\n    return path.with_name(raw['file'])",
    ),
    (
        names_from_files_become_paths_in_one_place,
        "data/a.py",
        "class A:\n    def f(self, root):\n        return os.path.join(root, self.dataset.fingerprint[:32])",
    ),
    (short_files, "data/a.py", "\n" * 401),
    (short_functions, "data/a.py", "class A:\n    def f(self):\n" + "        pass\n" * 60),
    (names_that_say_something, "data/io_utils.py", ""),
    (names_that_say_something, "common/a.py", ""),
    (names_that_say_something, "data/a.py", "class RowManager: ..."),
]
ALLOWED = [
    (imports_only_from_floors_below, "train/a.py", "from megatron_ettin.model import build\nfrom . import loop"),
    (imports_only_from_floors_below, "cli/main.py", "from megatron_ettin import __version__"),
    (no_torch_when_metrics_is_imported, "metrics/a.py", "def f():\n    import wandb"),
    (device_names_only_in_platform, "platform/a.py", "import torch\ntorch.cuda.synchronize()"),
    (device_names_only_in_platform, "model/a.py", '"""No cuda, no gloo."""\nmodel_parallel_cuda_manual_seed(1)'),
    (transformers_only_in_convert_and_tokenizer, "data/tokenizer.py", "from transformers import AutoTokenizer"),
    (global_groups_only_in_parallel, "parallel/groups.py", "from megatron.core import parallel_state as ps"),
    (lines_only_through_the_run_log, "cli/a.py", "print('step 1')"),
    (lines_only_through_the_run_log, "train/a.py", "log_info('step 1')"),
    (
        names_from_files_become_paths_in_one_place,
        "data/a.py",
        "def f(folder):\n    for name in read_entries(folder):\n        open(path_in(folder, name, folder / 'x'))",
    ),
    (short_functions, "data/a.py", "def f():\n" + "    pass\n" * 59),
]


@pytest.mark.parametrize(("rule", "path", "text"), BREACHES, ids=lambda value: getattr(value, "__name__", None))
def test_architecture_rule_catches_breach(rule, path, text):
    assert list(rule(Module(path, text)))


@pytest.mark.parametrize(("rule", "path", "text"), ALLOWED, ids=lambda value: getattr(value, "__name__", None))
def test_architecture_rule_passes_allowed_code(rule, path, text):
    assert list(rule(Module(path, text))) == []


def test_architecture_rules_all_have_a_breach_example():
    assert {rule for rule, _, _ in BREACHES} == {*IN_THE_PACKAGE, *EVERYWHERE}


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_floors_of_docs_name_every_room(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    rooms = [room for room in FLOORS if room != "__main__"]
    names = {room: f"{room}/" if (ROOT / PACKAGE / room).is_dir() else f"{room}.py" for room in rooms}
    assert [room for room, name in names.items() if name not in text] == []


def test_architecture_page_shows_drawings_of_the_code() -> None:
    """The drawings of docs/architecture.md are what tools/draw_floors.py makes of the code."""
    command = [sys.executable, str(ROOT / "tools" / "draw_floors.py"), "--check"]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0
