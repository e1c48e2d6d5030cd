"""The fuzzed readers. Each has valid files, the ones to damage and how, and a call that reads everything."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuzzing import run_readers as runs
from fuzzing.mutators import mutated_bytes, mutated_json, mutated_pickle, mutated_yaml, mutated_zip

FIXTURES = Path(__file__).resolve().parents[2] / "tests" / "fixtures"


@dataclass(frozen=True)
class Reader:
    """`make(folder)` writes good files there and returns the names of those to damage; `read(folder)` reads them."""

    make: Callable[[Path], list[str]]
    read: Callable[[Path], Any]
    mutate: Callable[..., bytes]


def make_index(folder: Path) -> list[str]:
    import numpy as np

    from megatron_ettin.data.indexed import index_bytes

    lengths = np.array([5, 7, 1, 30, 2])
    (folder / "a.idx").write_bytes(index_bytes(lengths, np.array([0, 2, 5]), np.dtype("<u2")))
    (folder / "a.bin").write_bytes(np.arange(lengths.sum(), dtype="<u2").tobytes())
    return ["a.idx"]


def read_index(folder: Path) -> None:
    """Read the shard as training opens it, and the documents as `ettin prepare` reads them."""
    from megatron_ettin.data.indexed import open_shard
    from megatron_ettin.prepare.readers.indexed import read_header

    with open(folder / "a.idx", "rb") as stream:
        read_header(stream, str(folder / "a.idx"), (folder / "a.idx").stat().st_size)
    shard = open_shard(folder / "a")
    for number in range(min(len(shard.chunk_lengths), 10)):
        shard.chunk(number).sum()


def make_manifest(folder: Path) -> list[str]:
    from megatron_ettin.data import manifest

    record = {"bytes": 10, "sha256": "0" * 64}
    values = {"int": 3, "str": "text", "float": 0.5, "bool": False, "int | None": 4}

    def filled(record_class: Any) -> dict[str, Any]:
        """Return a record with a plausible value in every field that holds one."""
        return {
            field.name: values[str(field.type)]
            for field in dataclasses.fields(record_class)
            if str(field.type) in values
        }

    content = filled(manifest.Manifest) | {"format": manifest.FORMAT, "version": manifest.VERSION}
    content["tokenizer"] = filled(manifest.TokenizerRecord) | {"special_ids": [0, 1, 2]}
    content["fingerprint"] = content["tokenizer"]["fingerprint"] = "f" * 64
    content["dtype"] = "uint16"
    content["shards"] = [
        filled(manifest.ShardRecord) | {"name": "shard_00000", "files": {".bin": record, ".idx": record}}
    ]
    content |= {"sources": [filled(manifest.SourceRecord)], "tokenizer_files": {"tokenizer.json": record}}
    (folder / "manifest.json").write_text(json.dumps(content))
    return ["manifest.json"]


def read_manifest(folder: Path) -> None:
    from megatron_ettin.data.manifest import read_manifest as read

    read(folder)


def make_mds(folder: Path) -> list[str]:
    """Write a dataset with mosaicml-streaming."""
    source = FIXTURES / "mds" / "text"
    for path in source.iterdir():
        shutil.copy(path, folder)
    return sorted(path.name for path in source.iterdir())


def read_mds(folder: Path) -> None:
    from megatron_ettin.prepare.filesystem import entries
    from megatron_ettin.prepare.readers.mds import samples
    from megatron_ettin.prepare.readers.mds_index import mds_files, shard_from_json

    listed = {entry.url: entry for entry in entries(str(folder))}
    for file in mds_files(str(folder), listed, "x", "x") or []:
        for number, _ in enumerate(samples(file, shard_from_json(file.detail))):
            if number > 20:
                break


def make_safetensors(folder: Path) -> list[str]:
    import torch
    from safetensors.torch import save_file

    tensors = {f"layers.{n}.weight": torch.ones(3, 4 + n) for n in range(3)}
    save_file(tensors, folder / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    index = {"metadata": {"total_size": 180}, "weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return ["model-00001-of-00001.safetensors", "model.safetensors.index.json"]


def read_safetensors(folder: Path) -> None:
    from megatron_ettin.convert.safetensors_file import ModelFiles

    files = ModelFiles(folder)
    for name in list(files.tensors)[:10]:
        files.read(name)


def mutated_weights(draw: Any, content: bytes, others: list[bytes]) -> bytes:
    """Damage a file whose header is JSON after its length."""
    if content.startswith(b"{"):
        return mutated_json(draw, content, others)
    if draw.random() < 0.5:
        return mutated_bytes(draw, content, [content])
    size = int.from_bytes(content[:8], "little")
    header = mutated_json(draw, content[8 : 8 + size].rstrip(b" "), [content[8 : 8 + size]])
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def make_hf_config(folder: Path) -> list[str]:
    from megatron_ettin.config.resolve import parse
    from megatron_ettin.convert.hf_config import to_hf_config

    ids = {"cls": 1, "sep": 2, "pad": 3, "mask": 4, "unk": 0, "bos": 1, "eos": 2}
    config = parse("17m", "mlm", "pretrain")
    (folder / "config.json").write_text(json.dumps(to_hf_config(config.model, "mlm", "float32", ids)))
    return ["config.json"]


def read_hf_config(folder: Path) -> None:
    from megatron_ettin.convert.hf_config import from_hf_config

    from_hf_config(folder / "config.json")


def make_composer(folder: Path) -> list[str]:
    import torch

    weights = {f"model.layers.{n}.weight": torch.ones(4, 3) for n in range(3)}
    torch.save({"state": {"model": weights, "timestamp": {"batch": 3}}, "rng": [1, 2.5, "x"]}, folder / "ep0.pt")
    return ["ep0.pt"]


def read_composer(folder: Path) -> None:
    from megatron_ettin.convert.composer.safe_unpickler import TensorRecord, TorchFile

    file = TorchFile(folder / "ep0.pt")
    try:
        tree, count = [file.tree], 0
        while tree and count < 50:
            one, count = tree.pop(), count + 1
            if isinstance(one, TensorRecord) and one.dtype in ("FloatStorage", "HalfStorage"):
                file.read(one)
            elif isinstance(one, dict):
                tree += list(one.values())
    finally:
        file.close()


GOOD_SITES = {
    "site.json": json.dumps(
        {"optim": {"lr": 1e-3}, "data": {"mixture": ["a", "b"]}, "phases": {"extend": {"data": {"seq_len": 8192}}}}
    ).encode(),
    "site.yaml": b"data: {mixture: [a, b], seq_len: 1024}\noptim:\n  lr: 1e-3\nphases:\n  extend:\n"
    b"    run: {tokens: 1.5B}\n",
}


def make_site(folder: Path) -> list[str]:
    for name, content in GOOD_SITES.items():
        (folder / name).write_bytes(content)
    return ["site.yaml", "site.json"]


def read_site(folder: Path) -> None:
    """Read the file as a user config, its lines as overrides, and sometimes, because it is slow, as a whole run."""
    from megatron_ettin.config.overrides import read_layers
    from megatron_ettin.config.resolve import parse

    paths = [folder / name for name, content in GOOD_SITES.items() if (folder / name).read_bytes() != content]
    path = (paths or [folder / "site.yaml"])[0]
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    overrides = [line.strip().replace(": ", "=", 1) for line in lines if ": " in line][1:2]
    read_layers(None, [f"optim.{word}" for word in overrides], "extend")
    read_layers(path, [], "extend")
    if len(lines) % 50 == 7 or path.stat().st_size % 50 == 7:
        parse("17m", "mlm", "extend", user_config=path)


def make_checkpoint(folder: Path) -> list[str]:
    import torch

    from megatron_ettin.checkpoint.integrity import seal
    from megatron_ettin.checkpoint.weights_writer import write_weights

    write_weights(folder, ((f"w{n}", torch.ones(n + 1, 3)) for n in range(3)), {"progress": {"step": 3}})
    seal(folder)
    return [".metadata", "common.pt", "__0_0.distcp"]


def read_checkpoint(folder: Path) -> None:
    from megatron_ettin.checkpoint.reader import CheckpointReader, read_common

    read_common(folder)
    reader = CheckpointReader(folder)
    for key in reader.keys()[:10]:
        reader.read(key)


def mutated_checkpoint(draw: Any, content: bytes, others: list[bytes]) -> bytes:
    return (mutated_zip if content.startswith(b"PK") else mutated_pickle)(draw, content, others)


def make_records(folder: Path) -> list[str]:
    lines = [{"step": step, "tokens": step * 100, "loss": 9.0 / step, "rows": [step, step + 8]} for step in range(1, 5)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = {"common.pt": {"bytes": 3, "sha256": "a" * 64}}
    # of the format whose record has no digest of itself
    files["__0_0.distcp"] = {"bytes": 40, "block_bytes": 16, "blocks": ["b" * 64] * 3}
    (folder / "integrity.json").write_text(json.dumps({"format": 1, "files": files}))
    (folder / "progress.json").write_text(json.dumps({"step": 3, "tokens": 300, "recent": [[1.0, 2.0]]}))
    return ["integrity.json", "progress.json"]


def read_records(folder: Path) -> None:
    from megatron_ettin.checkpoint.directory import read_progress
    from megatron_ettin.checkpoint.integrity import read_entries

    read_entries(folder)
    read_progress(folder)


def make_metrics(folder: Path) -> list[str]:
    make_records(folder)
    return ["metrics.jsonl"]


def read_metrics(folder: Path) -> None:
    from megatron_ettin.metrics.record import read_metrics as read

    with contextlib.redirect_stderr(io.StringIO()):
        read(folder / "metrics.jsonl")


READERS = {
    "idx": Reader(make_index, read_index, mutated_bytes),
    "manifest": Reader(make_manifest, read_manifest, mutated_json),
    "mds": Reader(make_mds, read_mds, lambda d, c, o: (mutated_json if c.startswith(b"{") else mutated_bytes)(d, c, o)),
    "safetensors": Reader(make_safetensors, read_safetensors, mutated_weights),
    "hf-config": Reader(make_hf_config, read_hf_config, mutated_json),
    "composer": Reader(make_composer, read_composer, mutated_zip),
    "yaml": Reader(make_site, read_site, mutated_yaml),
    "checkpoint": Reader(make_checkpoint, read_checkpoint, mutated_checkpoint),
    "records": Reader(make_records, read_records, mutated_json),
    "metrics": Reader(make_metrics, read_metrics, mutated_bytes),
    "status": Reader(runs.make_run, runs.read_status, runs.mutated_run),
    "report": Reader(runs.make_run, runs.read_report, runs.mutated_run),
    "compare": Reader(runs.make_run, runs.read_compare, runs.mutated_run),
    "mixture": Reader(runs.make_mixture, runs.read_mixture, runs.mutated_mixture),
    "local-copy": Reader(
        runs.make_dataset,
        runs.read_local_copy,
        lambda d, c, o: (mutated_json if c.startswith(b"{") else mutated_bytes)(d, c, o),
    ),
    "tokenizer": Reader(runs.make_tokenizer, runs.read_tokenizer, mutated_json),
    "links": Reader(runs.make_links, runs.read_links, runs.mutated_file_name),
}
