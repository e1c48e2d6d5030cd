"""The package follows the rules of tests/architecture.py. Each rule catches a breach, and accepts what is allowed."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.architecture import (
    EVERYWHERE,
    FLOORS,
    IN_THE_PACKAGE,
    PACKAGE,
    ROOT,
    Module,
    dashboards_only_in_metrics,
    deepspeed_only_in_platform_and_optim,
    device_names_only_in_platform,
    every_room_has_a_floor,
    full_files,
    global_groups_only_in_parallel,
    imports_only_from_floors_below,
    lines_only_through_the_run_log,
    megatron_only_where_it_is_wrapped,
    modules,
    names_from_files_become_paths_in_one_place,
    names_in_the_words_of_the_field,
    names_that_say_something,
    never_megatron_training,
    no_torch_on_the_lowest_floors,
    no_torch_when_metrics_is_imported,
    prints_only_in_cli,
    public_classes_of_two_rooms,
    short_files,
    short_functions,
    transformers_only_in_convert_and_tokenizer,
)


@pytest.mark.parametrize("rule", [*IN_THE_PACKAGE, *EVERYWHERE], ids=lambda rule: rule.__name__)
def test_architecture_rule_has_no_breach(rule):
    checked = modules(PACKAGE) if rule in IN_THE_PACKAGE else modules(PACKAGE, "examples", "tools")
    assert len(checked) > 10
    assert [f"{module.path}: {breach}" for module in checked for breach in rule(module)] == []


def test_public_classes_have_names_of_their_own():
    assert public_classes_of_two_rooms(modules(PACKAGE)) == []


def test_public_classes_of_two_rooms_lists_shared_names():
    checked = [
        Module("data/a.py", "class Shard: ...\nclass _Row: ..."),
        Module("data/b.py", "class Row: ..."),
        Module("optim/a.py", "class Shard: ...\nclass Row2: ..."),
        Module("data/c.py", "class Row: ...\ndef f():\n    class Row2: ..."),
    ]
    assert public_classes_of_two_rooms(checked) == ["Shard: data/a.py, optim/a.py"]


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
    (deepspeed_only_in_platform_and_optim, "train/a.py", "def f():\n    import deepspeed"),
    (prints_only_in_cli, "train/a.py", "print('step 1')"),
    (prints_only_in_cli, "report/a.py", "def copy(log=print): ..."),
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
    (full_files, "data/a.py", "\n" * 59),
    (short_functions, "data/a.py", "class A:\n    def f(self):\n" + "        pass\n" * 80),
    (names_in_the_words_of_the_field, "data/a.py", "def tell_reader(): ..."),
    (names_in_the_words_of_the_field, "data/a.py", "def f(*, row_kind): ..."),
    (names_in_the_words_of_the_field, "data/a.py", "for place, row in rows: ..."),
    (names_in_the_words_of_the_field, "data/a.py", "class SaveWish: ..."),
    (names_in_the_words_of_the_field, "data/a.py", "class A:\n    kinds: int\n    def f(self): self.told = 1"),
    (names_in_the_words_of_the_field, "data/a.py", "import os as heart"),
    (names_in_the_words_of_the_field, "data/a.py", "class Verdict: ..."),
    (names_in_the_words_of_the_field, "data/kinds.py", ""),
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
    (prints_only_in_cli, "cli/a.py", "print('step 1')"),
    (prints_only_in_cli, "plan/a.py", "console.print('step 1')"),
    (lines_only_through_the_run_log, "train/a.py", "log_info('step 1')"),
    (
        names_from_files_become_paths_in_one_place,
        "data/a.py",
        "def f(folder):\n    for name in read_entries(folder):\n        open(path_in(folder, name, folder / 'x'))",
    ),
    (full_files, "data/a.py", "\n" * 60),
    (full_files, "data/__init__.py", ""),
    (short_functions, "data/a.py", "def f():\n" + "    pass\n" * 79),
    (names_in_the_words_of_the_field, "data/a.py", "def placeholder(in_place): return record.kind + FileNotFoundError"),
]


@pytest.mark.parametrize(("rule", "path", "text"), BREACHES, ids=lambda value: getattr(value, "__name__", None))
def test_architecture_rule_catches_breach(rule, path, text):
    assert list(rule(Module(path, text)))


@pytest.mark.parametrize(("rule", "path", "text"), ALLOWED, ids=lambda value: getattr(value, "__name__", None))
def test_architecture_rule_passes_allowed_code(rule, path, text):
    assert list(rule(Module(path, text))) == []


def test_architecture_rules_all_have_a_breach_example():
    assert {rule for rule, _, _ in BREACHES} == {*IN_THE_PACKAGE, *EVERYWHERE}


def test_architecture_page_names_every_room() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms = [room for room in FLOORS if room != "__main__"]
    names = {room: f"{room}/" if (ROOT / PACKAGE / room).is_dir() else f"{room}.py" for room in rooms}
    assert [room for room, name in names.items() if name not in text] == []


def test_architecture_page_shows_drawings_of_the_code() -> None:
    """The drawings of docs/architecture.md are what tools/draw_floors.py makes of the code."""
    command = [sys.executable, str(ROOT / "tools" / "draw_floors.py"), "--check"]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0
