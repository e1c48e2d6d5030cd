"""Collect the facts that a page shows besides curves: data consumed, checkpoints, their exports, launches, hosts.

`escaped` prepares text from a run's files for the page: it hides secrets and escapes HTML.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ettin.base.digests import sha256
from megatron_ettin.base.errors import UserError
from megatron_ettin.base.parsing import read_json_lines, read_json_object
from megatron_ettin.base.text import masked
from megatron_ettin.checkpoint.directory import list_checkpoints, list_milestones
from megatron_ettin.checkpoint.integrity import INTEGRITY, read_entries, verify
from megatron_ettin.runs.chain import PhaseChain
from megatron_ettin.runs.directory import RunDirectory

RELEASE, PARITY = "release.json", "parity.json"


@dataclass(frozen=True)
class Consumed:
    """Tokens of one dataset, or of one source within it, that a model has read. None: not known."""

    name: str
    share: float | None
    """Share of all known tokens, 0 to 1."""
    tokens: float | None
    epochs: float | None
    """Number of times that the dataset was read."""
    inner: Sequence[Consumed] = ()
    """Sources of a dataset that has more than one."""


def consumed(runs: Iterable[RunDirectory]) -> list[Consumed]:
    """Estimate the tokens read of each dataset in all phases, from the configured mixture and each phase's tokens."""
    tokens: dict[str, float | None] = {}
    for run in runs:
        for path, share in run.dataset_shares:
            before = tokens.get(path, 0.0)
            tokens[path] = None if share is None or before is None else before + share * run.tokens
    known = sum(value for value in tokens.values() if value is not None)
    datasets = []
    for path, value in tokens.items():
        manifest = read_json_object(Path(path) / "manifest.json")
        size = manifest.get("tokens")
        share = value / known if value is not None and known else None
        epochs = value / size if value is not None and isinstance(size, int) and size > 0 else None
        datasets.append(Consumed(path, share, value, epochs, tuple(_sources(manifest, value, share, epochs))))
    return datasets


def _sources(
    manifest: dict[str, Any], tokens: float | None, share: float | None, epochs: float | None
) -> Iterator[Consumed]:
    """Yield the sources of a dataset, each with a part in proportion to its tokens, because rows are read shuffled."""
    sources = [
        one for one in manifest.get("sources") or [] if isinstance(one, dict) and isinstance(one.get("tokens"), int)
    ]
    whole = sum(one["tokens"] for one in sources)
    for one in sources if len(sources) > 1 and whole else []:
        part = one["tokens"] / whole
        shared, read = (None if value is None else value * part for value in (share, tokens))
        yield Consumed(str(one.get("name")), shared, read, epochs)


def saved_paths(run: RunDirectory) -> list[tuple[str, Path]]:
    """Return (`checkpoint` or `milestone`, path) of everything that a run has saved, oldest first."""
    paths = [("checkpoint", path) for path in list_checkpoints(run.path)]
    paths += [("milestone", path) for path in list_milestones(run.path)]
    return sorted(paths, key=lambda saved: saved[1].name)


def integrity_of(checkpoint: Path) -> tuple[bool, str, int | None]:
    """Compare a checkpoint's file sizes with the recorded ones.

    Returns:
        Whether they agree, a text with the result, and the bytes of all files (None if they disagree).
    """
    try:
        entries = read_entries(checkpoint)
        verify(checkpoint, checksums=False)
    except (UserError, OSError) as error:
        return False, str(error).removeprefix(f"{checkpoint}/"), None
    return True, f"{len(entries)} files in their recorded sizes", sum(entry["bytes"] for entry in entries.values())


def parity_of(checkpoint: Path, exports: dict[str, tuple[Path, str]]) -> str:
    """Return a text on the parity of a checkpoint's export with transformers. `exports`: result of `exported`."""
    if not exports:
        return "no export found"
    try:
        # an export records this digest of its checkpoint as `source`
        export = exports.get(sha256(checkpoint / INTEGRITY))
    except OSError:
        export = None
    return "not exported" if export is None else describe_parity(*export)


def describe_parity(folder: Path, name: str) -> str:
    """Return a text on the parity record of the export in `folder`. `name`: name of the export in the text."""
    parity = read_json_object(folder / PARITY)
    difference = parity.get("max_abs_logit_difference")
    if not parity.get("tensors_identical"):
        return f"in {name}, not verified"
    logits = f", logits within {difference:.1e}" if isinstance(difference, float) else ""
    return f"verified in {name}: tensors equal{logits}"


def exported(models: Sequence[PhaseChain], folders: Sequence[Path]) -> dict[str, tuple[Path, str]]:
    """Find the exports of checkpoints: digest of the checkpoint's integrity.json -> (folder, name) of the export.

    Searched are the releases `folders`, and releases and exports of `ettin convert` in the run directories and in their
    parent folders.
    """
    nearby = {
        above for model in models for run in model.runs for above in (run.path.resolve(), run.path.resolve().parent)
    }
    release_folders = {folder.resolve() for folder in folders}
    release_folders |= {record.parent for above in nearby for record in above.glob(f"*/{RELEASE}")}
    exports = {}
    for path in sorted(path for above in nearby for path in above.glob(f"*/{PARITY}")):
        exports[str(read_json_object(path).get("source"))] = (path.parent, path.parent.name)
    for path in sorted(path for folder in release_folders for path in folder.glob(f"*/{RELEASE}")):
        record = read_json_object(path)
        if isinstance(record.get("source"), str) and path.parent.name != "main":
            exports[record["source"]] = (path.parent, f"revision {record.get('revision')}")
    return exports


def used(run: RunDirectory, key: str) -> str:
    """Return the value of a `runtime` key (`device`, `attention`) in the latest launch, else the configured one."""
    latest = run.launches[-1].get(key) if run.launches else None
    return str(latest) if latest else f"{run.setting('runtime', key)} (as configured)"


def device_hours(model: PhaseChain) -> float | None:
    """Return the sum over launches of hours spent in steps times ranks; None if either was not recorded."""
    total, before = 0.0, 0.0
    for run, own in zip(model.runs, model.axes(), strict=True):
        if not len(own["steps"]):
            continue
        launches = [one for one in run.launches if type(one.get("world")) is int and type(one.get("step")) is int]
        if not launches or "hours" not in own:
            return None
        launch_index = np.searchsorted([one["step"] for one in launches], run.metrics.steps, side="left") - 1
        worlds = np.array([one["world"] for one in launches])[np.maximum(launch_index, 0)]
        total += float((np.diff(own["hours"], prepend=before) * worlds).sum())
        before = float(own["hours"][-1])
    return total


def commits(model: PhaseChain) -> list[str]:
    """Return the distinct commits that the phases ran, oldest first; without a commit, version and code digest."""
    code = [
        one.get("commit") or f"{one.get('version')} ({one['code']})"
        for run in model.runs
        for one in run.launches
        if one.get("commit") or one.get("code")
    ]
    return list(dict.fromkeys(map(str, code)))


def hosts(run: RunDirectory) -> list[str]:
    """Return the hosts known to have trained the run: from watch/rank_*.json, launches, job events and metrics."""
    ranks = sorted(run.path.glob("watch/rank_*.json"))[:10_000]
    names = [str(read_json_object(path).get("host") or "") for path in ranks]
    names += [str(launch.get("host") or "") for launch in run.launches]
    for folder in run.submission_folders:
        names += [str(event["nodes"]) for event in read_json_lines(folder / "events.jsonl") if event.get("nodes")]
    return [name for name in dict.fromkeys([*names, *run.metrics.slowest_hosts]) if name]


def escaped(text: object, key: str = "") -> str:
    """Return text as HTML, without secrets. `key`: name of the setting that the text is the value of."""
    return html.escape(masked(text, key))


def embedded(value: Any) -> str:
    """Return JSON for a <script> element, escaped so that no text in it can end the element."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
