"""Fuzzed readers of folders: runs, mixtures, datasets to copy, tokenizers, links in checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

from fuzzing.mutators import mutated_bytes, mutated_json, mutated_yaml

STEPS = range(1, 5)
ORDER = {"fingerprint": "a" * 64, "unskipped_fingerprint": "a" * 64, "tokenizer": "b" * 64, "datasets": ["c" * 64]}
NAMES = {"latest": "checkpoints/latest", "events.jsonl": "slurm/events.jsonl", "rank.json": "slurm/attempts/7.0/x"}


def make_run(folder: Path) -> list[str]:
    """Write the files of a run of four steps into one flat folder, from which `laid_out` makes a run directory."""
    from megatron_ettin.config.resolve import parse, to_yaml

    lines = [
        {"step": n, "tokens": n * 100, "loss": 9.0 / n, "lr": 1e-3, "grad_norm": 1.0, "tokens_per_second": 50.0}
        | {"step_seconds": 2.0, "updates": n, "slowest_rank": 0, "slowest_host": "n1", "slowest_ratio": 1.5}
        for n in STEPS
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    launch = {"time": "2026-01-01T00:00:00+0000", "version": "1", "from": "x", "changes": [], "layout": "dp 1"}
    (folder / "history.jsonl").write_text(json.dumps(launch | {"world": 1, "step": 0}) + "\n")
    (folder / "order.json").write_text(json.dumps(ORDER | {"rows_per_step": 8, "mean_tokens_per_row": 9.5}))
    (folder / "bad_steps.jsonl").write_text(json.dumps({"step": 2, "bad": "spike", "rows": [1, 2]}) + "\n")
    (folder / "config.yaml").write_text(to_yaml(parse("17m", "mlm", "pretrain")))
    (folder / "latest").write_text("step_000000004\n")
    event = {"event": "submitted", "job": "7", "runs": [str(folder / "run")], "time": 1.0}
    (folder / "events.jsonl").write_text(
        "".join(json.dumps(event | {"event": e}) + "\n" for e in ("submitted", "done"))
    )
    return ["metrics.jsonl", "history.jsonl", "order.json", "bad_steps.jsonl", "config.yaml", "latest", "events.jsonl"]


@contextlib.contextmanager
def laid_out(folder: Path) -> Any:
    """Return the run directory that the files of `make_run` form."""
    run = folder / "run"
    for inside in ("checkpoints/step_000000004", "slurm"):
        (run / inside).mkdir(parents=True)
    try:
        for path in folder.iterdir():
            if path.is_file():
                shutil.copyfile(path, run / NAMES.get(path.name, path.name))
        yield run
    finally:
        _remove(run)


def _remove(folder: Path) -> None:
    """Stand in for shutil.rmtree, which a reader must not call."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            _remove(path)
        else:
            path.unlink()
    folder.rmdir()


def read_status(folder: Path) -> None:
    from megatron_ettin.cli.status import cells
    from megatron_ettin.launch.run_state import run_state, runs_below

    with laid_out(folder) as run, contextlib.redirect_stderr(io.StringIO()):
        for run_dir in runs_below(run):
            cells(run_state(run_dir), None)


def read_report(folder: Path) -> None:
    from megatron_ettin.report import document

    with laid_out(folder) as run, contextlib.redirect_stderr(io.StringIO()):
        document.render(document.make([run]))


def read_compare(folder: Path) -> None:
    """Compare the damaged run with itself: a pair without differences."""
    from megatron_ettin.report.compare import compare

    with laid_out(folder) as run, contextlib.redirect_stderr(io.StringIO()):
        for chain in compare([run, run]).chains:
            chain.summary()


def mutated_run(draw: Any, content: bytes, others: list[bytes]) -> bytes:
    """Put values of other types into JSON lines, else change bytes."""
    if draw.random() < 0.4:
        return mutated_bytes(draw, content, others)
    if not content.startswith(b"{"):
        plain = [json.dumps({"run": {"steps": 4, "tokens": 500}, "model": {"num_layers": 2}}).encode()]
        return mutated_yaml(draw, content, plain) if b": " in content else mutated_bytes(draw, content, others)
    lines = content.splitlines()
    index = draw.randrange(len(lines))
    lines[index] = mutated_json(draw, lines[index], lines)
    return b"\n".join(lines) + b"\n"


def make_mixture(folder: Path) -> list[str]:
    (folder / "mixture.yaml").write_text("datasets:\n  - {path: a, weight: 0.5}\n  - {path: b, weight: 1}\n")
    return ["mixture.yaml"]


def read_mixture(folder: Path) -> None:
    from megatron_ettin.data.mixture import parse_mixture

    parse_mixture(str(folder / "mixture.yaml"), None)


def mutated_mixture(draw: Any, content: bytes, others: list[bytes]) -> bytes:
    plain = {"datasets": [{"path": "a", "weight": 0.5}, {"path": "b", "tokens": "1B"}]}
    return mutated_yaml(draw, content, [json.dumps(plain).encode()])


def make_dataset(folder: Path) -> list[str]:
    """Make a dataset of one shard of three chunks."""
    import hashlib

    import numpy as np

    from megatron_ettin.data import manifest
    from megatron_ettin.data.indexed import index_bytes

    lengths = np.array([5, 7, 4])
    contents = {".idx": index_bytes(lengths, np.array([0, 2, 3]), np.dtype("<u2"))}
    contents[".bin"] = np.arange(lengths.sum(), dtype="<u2").tobytes()
    for suffix, content in contents.items():
        (folder / f"shard_00000{suffix}").write_bytes(content)
    files = {s: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for s, c in contents.items()}
    values = {"int": 3, "str": "text", "float": 0.5, "bool": False, "int | None": 4}

    def filled(record_class: Any) -> dict[str, Any]:
        return {
            field.name: values[str(field.type)]
            for field in dataclasses.fields(record_class)
            if str(field.type) in values
        }

    counts = {"documents": 2, "chunks": 3, "tokens": 16}
    content = filled(manifest.Manifest) | {"format": manifest.FORMAT, "version": manifest.VERSION, **counts}
    content |= {"dtype": "uint16", "fingerprint": "d" * 64}
    content["tokenizer"] = filled(manifest.TokenizerRecord) | {"special_ids": [0, 1, 2], "fingerprint": "e" * 64}
    content["shards"] = [{"name": "shard_00000", **counts, "files": files}]
    content |= {"sources": [{"name": "text", **counts}], "tokenizer_files": {}}
    (folder / "manifest.json").write_text(json.dumps(content))
    return ["manifest.json", "shard_00000.idx"]


def read_local_copy(folder: Path) -> None:
    """Copy the files of a dataset, and check that nothing is written outside of the root."""
    import threading

    from megatron_ettin.data.dataset import open_dataset
    from megatron_ettin.data.local_copy import copy_file, units_to_copy

    root = folder / "root"
    root.mkdir()
    before = {path.name for path in folder.iterdir()}
    try:
        dataset = open_dataset(folder)
        for unit in units_to_copy(dataset, [], root):
            for name, record in unit.files.items():
                unit.staged(name).parent.mkdir(parents=True, exist_ok=True)
                copy_file(unit.source_file(name), unit.staged(name), record, threading.Event())
        for number in range(min(dataset.num_chunks, 5)):
            dataset.chunk(number)
    finally:
        assert {path.name for path in folder.iterdir()} == before, "something beside the root"
        _remove(root)


def make_tokenizer(folder: Path) -> list[str]:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "the", "word"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    roles = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "cls", "sep", "pad", "mask")}
    (folder / "tokenizer_config.json").write_text(json.dumps(roles))
    (folder / "special_tokens_map.json").write_text(json.dumps(roles))
    return ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]


def read_tokenizer(folder: Path) -> None:
    from megatron_ettin.data.tokenizer import load_tokenizer

    load_tokenizer(str(folder))


def make_links(folder: Path) -> list[str]:
    from fuzzing.readers import make_checkpoint

    make_checkpoint(folder)
    (folder / "secret").write_text("x")
    (folder / "secret").unlink()
    (folder / "link.txt").write_text("integrity.json")
    return ["link.txt"]


def mutated_file_name(draw: Any, content: bytes, others: list[bytes]) -> bytes:
    """Choose where a link is put into a checkpoint: in place of one of its files, or in addition."""
    names = ["common.pt", ".metadata", "__0_0.distcp", "tokenizer.json", "special_tokens_map.json", "a", ".hidden"]
    return draw.choice([name.encode() for name in names] + [b""])


def read_links(folder: Path) -> None:
    """Check that a checkpoint with a link that leads out is refused before anything of it is read."""
    from megatron_ettin.checkpoint.integrity import check_nothing_else, verify

    name = (folder / "link.txt").read_text()
    given = folder / "given"
    given.mkdir()
    try:
        for path in folder.iterdir():
            if path.is_file() and path.name != "link.txt":
                shutil.copyfile(path, given / path.name)
        if name and name != "integrity.json":
            (given / name).unlink(missing_ok=True)
            os.symlink("/etc/passwd", given / name)
        check_nothing_else(given)
        verify(given)
        assert name in ("", "integrity.json"), "a link was taken"
    finally:
        _remove(given)
