"""The rules of docs/architecture.md as code: each rule reads the package's syntax trees and yields every breach.

A rule is a function from one module (its path in the package, its tree, its text) to breaches.
tests/test_architecture.py runs the rules, and shows that each one catches a breach."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

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
# rooms of this floor may import from each other, but no two modules may import each other
OPEN_FLOOR = 8
MEGATRON_ROOMS = {"parallel", "platform", "model", "optim", "checkpoint", "train"}
DEEPSPEED_ROOMS = {"platform", "optim"}
# rooms whose code runs while a run trains
WHILE_TRAINING = {
    *("train", "faults", "evaluate", "runs", "metrics", "platform", "parallel"),
    *("data", "model", "batching", "optim", "checkpoint"),
}
PRINTING = {"stdout", "stderr", "__stdout__", "__stderr__", "print_exc", "print_exception", "print_stack", "warn"}
EMPTY_NAMES = {"utils", "util", "helpers", "helper", "common", "misc"}
DEVICE_NAMES = {"nccl", "gloo", "cuda"}
FEWEST_FILE_LINES, MOST_FILE_LINES, MOST_FUNCTION_LINES = 60, 400, 80
# words that readers of Megatron-LM or torchtitan would not know; a name may not contain one as a part either
BANNED_WORDS = {
    *("asked", "beside", "chief", "culprit", "found", "heart", "kind", "kinds", "place", "places", "said"),
    *("settle", "settled", "tell", "tells", "told", "unread", "wish", "words"),
}
# parts of names that other libraries or older files chose, which may contain a banned word
NAMES_OF_OTHERS = {"in_place", "not_found"}
BANNED_CLASSES = {
    *("Bad", "Ended", "Fusible", "Guard", "HeldOut", "Inert", "InOrder", "KeyedOrder", "GivenOrder", "Labeller"),
    *("Loaded", "Machine", "Measured", "Outcome", "Peer", "Piece", "Replayed", "Screen", "Sign", "Sums", "Traffic"),
    *("Verdict", "Watch", "WholeTensor"),
}


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
        """Return the module's room, a package or a top-level module, such as "data" or "api"."""
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

    def defined_names(self) -> Iterator[tuple[int, str]]:
        """Yield (line, name) of each function, class, parameter, variable, field and attribute that the module
        defines."""
        for node in self.nodes:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield node.lineno, node.name
            elif isinstance(node, ast.arg):
                yield node.lineno, node.arg
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                yield node.lineno, node.id
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                yield node.lineno, node.attr
            elif isinstance(node, ast.alias) and node.asname:
                yield node.lineno, node.asname


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
        yield f"{module.room} has no floor in FLOORS"


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


def deepspeed_only_in_platform_and_optim(module: Module) -> Iterator[str]:
    if module.room not in DEEPSPEED_ROOMS:
        yield from (f"line {line}: imports {name}" for line, name in module.imports_of("deepspeed"))


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


def prints_only_in_cli(module: Module) -> Iterator[str]:
    """Find `print`: the package logs, and only commands print."""
    if module.room != "cli":
        yield from (
            f"line {node.lineno}: print" for node in module.nodes if isinstance(node, ast.Name) and node.id == "print"
        )


def lines_only_through_the_run_log(module: Module) -> Iterator[str]:
    """Find writes that bypass the run log: such a write can end a run whose log cannot be written."""
    if module.room not in WHILE_TRAINING:
        return
    for node in module.nodes:
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


def full_files(module: Module) -> Iterator[str]:
    lines = len(module.text.splitlines())
    if lines < FEWEST_FILE_LINES and Path(module.path).name not in ("__init__.py", "__main__.py"):
        yield f"{lines} lines; at least {FEWEST_FILE_LINES}: it belongs to the module that uses it"


def short_functions(module: Module) -> Iterator[str]:
    for node in module.nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MOST_FUNCTION_LINES:
                yield f"line {node.lineno}: {node.name} has {lines} lines; at most {MOST_FUNCTION_LINES}"


def names_from_files_become_paths_in_one_place(module: Module) -> Iterator[str]:
    """Find names that come from a file and are joined to a path (`/`, `with_name`, `join`) without a check.

    Values are followed through the assignments and loops of one function. Of a function's arguments, only the fields
    in `NAME_FIELDS` count as read from a file."""
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
    *("load_json", "load_yaml", "loads", "load_object", "read_json", "read_yaml", "read_text"),
    *("read_record", "read_entries", "read_manifest", "manifest_from", "plan_record", "order_record", "read_metadata"),
    *("file_records", "read_progress", "read_config"),
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
    """Return whether an expression holds a value read from a file that no function of `NAME_CHECKS` has checked."""
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
    """Return the names of a function's variables that hold a value read from a file."""
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


def names_in_the_words_of_the_field(module: Module) -> Iterator[str]:
    for part in module.path.removesuffix(".py").split("/"):
        if banned := BANNED_WORDS & set(part.split("_")):
            yield f"the file is called {part!r}: {', '.join(banned)}"
    for line, name in sorted(set(module.defined_names())):
        if name in BANNED_CLASSES or BANNED_WORDS & words_of(name):
            yield f"line {line}: {name}"


@functools.cache
def words_of(name: str) -> frozenset[str]:
    """Return the lower-case words that a snake_case or CamelCase name consists of."""
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    for known in NAMES_OF_OTHERS:
        snake = snake.replace(known, "")
    return frozenset(snake.split("_"))


def public_classes_of_two_rooms(checked: list[Module]) -> list[str]:
    """Return the names of public classes that more than one room defines, with their modules."""
    paths: dict[str, list[Module]] = {}
    for module in checked:
        for node in module.tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                paths.setdefault(node.name, []).append(module)
    return [
        f"{name}: {', '.join(module.path for module in defining)}"
        for name, defining in sorted(paths.items())
        if len({module.room for module in defining}) > 1
    ]


IN_THE_PACKAGE = [
    imports_only_from_floors_below,
    every_room_has_a_floor,
    no_torch_on_the_lowest_floors,
    no_torch_when_metrics_is_imported,
    device_names_only_in_platform,
    transformers_only_in_convert_and_tokenizer,
    dashboards_only_in_metrics,
    megatron_only_where_it_is_wrapped,
    deepspeed_only_in_platform_and_optim,
    global_groups_only_in_parallel,
    never_megatron_training,
    prints_only_in_cli,
    lines_only_through_the_run_log,
    names_from_files_become_paths_in_one_place,
    full_files,
]
EVERYWHERE = [short_files, short_functions, names_that_say_something, names_in_the_words_of_the_field]


@functools.cache
def modules_of(folder: str) -> list[Module]:
    """Read the files of a folder; each is parsed once for all rules."""
    base = ROOT / folder
    files = sorted(base.rglob("*.py"))
    return [Module(path.relative_to(base).as_posix(), path.read_text(encoding="utf-8")) for path in files]


def modules(*folders: str) -> list[Module]:
    return [module for folder in folders for module in modules_of(folder)]
