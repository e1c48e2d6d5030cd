"""Name, publish, prune and find checkpoints on disk.

checkpoints/step_000000100/ is written as checkpoints/.tmp-step_000000100, sealed (integrity.json) and renamed. Only
then the file `latest` names it. So a kill at any instant leaves the previous checkpoint named and whole, and a reader
never needs to know where a writer stopped. The next start or the next save removes what a killed writer left.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron_ettin.base.digests import Entry
from megatron_ettin.base.errors import UserError, first_line
from megatron_ettin.base.files import publish_folder, write_atomically
from megatron_ettin.base.log import log_warning
from megatron_ettin.base.parsing import load_object, load_yaml
from megatron_ettin.base.paths import Links, path_in
from megatron_ettin.checkpoint.integrity import read_entries, seal, verify

LATEST = "latest"
_STAGING = ".tmp-"
# prefix of an older checkpoint of a step while a new one of the same step replaces it
_REPLACED = ".tmp-replaced-"
_PRUNED = ".tmp-pruned-"
# no more digits than any run needs, so that the name of a folder never becomes too long for the file system
_STEP = re.compile(r"step_(\d{9,18})", re.ASCII)


def step_name(step: int) -> str:
    """Return the name of a step's checkpoint folder."""
    return f"step_{step:09d}"


def step_of(path: Path) -> int:
    """Return the step in the name of a checkpoint folder; 0 for another name, such as that of an imported one."""
    match = _STEP.fullmatch(path.name.removeprefix(_REPLACED))
    return int(match[1]) if match else 0


def checkpoints_folder(run_dir: Path) -> Path:
    """Return the folder that holds a run's checkpoints and the file `latest`."""
    return Path(run_dir) / "checkpoints"


def milestones_folder(run_dir: Path) -> Path:
    """Return the folder of a run's milestones."""
    return Path(run_dir) / "milestones"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Return the published checkpoints, oldest first, damaged ones included."""
    return _steps_in(checkpoints_folder(run_dir))


def list_milestones(run_dir: Path) -> list[Path]:
    """Return the milestones (weights only, never pruned), oldest first."""
    return _steps_in(milestones_folder(run_dir))


def list_for_release(run_dir: Path) -> list[Path]:
    """Return the checkpoints to release, oldest first.

    They are the milestones and the newest checkpoint, or all checkpoints of a run without milestones.
    """
    milestones, checkpoints = list_milestones(run_dir), list_checkpoints(run_dir)
    if not milestones:
        return checkpoints
    steps = {step_of(path) for path in milestones}
    return sorted([*milestones, *(path for path in checkpoints[-1:] if step_of(path) not in steps)], key=step_of)


def _steps_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _STEP.fullmatch(path.name) and path.is_dir()), key=step_of)


def at_step(run_dir: Path, step: int) -> Path:
    """Return the checkpoint of a step or, if it is gone, the milestone of that step.

    Raises:
        UserError: the step has neither; the message lists the steps that have one.
    """
    by_step = {step_of(path): path for path in (*list_milestones(run_dir), *list_checkpoints(run_dir))}
    if step not in by_step:
        there = ", ".join(str(one) for one in sorted(by_step)) or "none"
        raise UserError(f"--from-step {step}: {run_dir} has no checkpoint of that step; there are: {there}")
    return by_step[step]


def _candidates(run_dir: Path) -> list[Path]:
    """Return the published checkpoints, and those that a killed save had moved aside, newest first."""
    published = list_checkpoints(run_dir)
    names = {path.name for path in published}
    aside = [
        path
        for path in checkpoints_folder(run_dir).glob(f"{_REPLACED}*")
        if path.name.removeprefix(_REPLACED) not in names
    ]
    return sorted(published + aside, key=step_of, reverse=True)


def named_latest(run_dir: Path, warn: Callable[[str], None] = log_warning) -> Path | None:
    """Return the checkpoint that `latest` names. If it names none, pass the reason to `warn` and return None."""
    path = checkpoints_folder(run_dir) / LATEST
    try:
        name = path.read_text(encoding="utf-8", errors="replace").strip()
        if not _STEP.fullmatch(name):
            warn(f"{path}: holds {name[:40]!r}, not the name of a checkpoint; looking for the newest good one")
            return None
        # a checkpoint's folder may be a link to another disk
        named = path_in(path.parent, name, path, links=Links.UNCHECKED)
        if named.is_dir():
            return named
        warn(f"{path}: names {name}, which is not there; looking for the newest good one")
    except FileNotFoundError:
        pass
    except OSError as error:
        warn(f"{path}: {error.strerror or error}; looking for the newest good one")
    return None


def latest(run_dir: Path, checksums: bool = False, check: Callable[[Path], None] | None = None) -> Path | None:
    """Return the checkpoint to resume from; None if the run has none.

    It is the one that `latest` names, if that one is whole, else the newest one that passes a check with checksums. The
    log names the damaged file of each checkpoint that is skipped.

    Args:
        run_dir: the run directory.
        checksums: whether the checksums of the one that `latest` names are compared too, not only its file sizes.
        check: function for a check with checksums, in place of `verify`.

    Raises:
        UserError: the run has checkpoints and all are damaged.
    """
    named = named_latest(run_dir)
    rest = [path for path in _candidates(run_dir) if path != named]
    if named and rest and step_of(rest[0]) > step_of(named):
        why = f"a save was killed before it was named, or {LATEST} has changed"
        log_warning(f"{named.parent / LATEST} names {named.name}, though there is {rest[0].name} ({why})")
    first_error: UserError | None = None
    for path in ([named] if named else []) + rest:
        try:
            if check is not None and (checksums or path != named):
                check(path)
            else:
                verify(path, checksums=checksums or path != named)
        except UserError as error:
            first_error = first_error or error
            log_warning(str(error))
            continue
        if path != named and (named or (checkpoints_folder(run_dir) / LATEST).exists() or first_error):
            log_warning(f"going on from {path}, the newest good checkpoint")
        return path
    if first_error:
        raise UserError(f"{run_dir}: no checkpoint is whole; the newest: {first_error}")
    return None


def resolve(path: Path) -> Path:
    """Return the checkpoint at a path, which is a checkpoint or a run directory (its latest). Raises UserError."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(
            f"{path}: {'not a folder' if path.exists() else 'no such folder'}; give a checkpoint or a run directory"
        )
    if (path / "metadata.json").is_file() or (path / "integrity.json").is_file():
        return path
    if not checkpoints_folder(path).is_dir():
        if (path / "config.yaml").is_file():
            raise UserError(f"{path}: the run has no checkpoint yet")
        raise UserError(f"{path}: neither a checkpoint (no metadata.json) nor a run directory (no checkpoints/)")
    newest = latest(path)
    if newest is None:
        raise UserError(f"{path}: the run has no checkpoint yet")
    return newest


def new_staging(folder: Path, step: int) -> Path:
    """Make an empty folder in which the checkpoint of a step is written.

    The remains of killed saves in `folder` are removed, so that they cannot fill the disk. Only one save may run at a
    time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"{_STAGING}step_*"):
        shutil.rmtree(left, ignore_errors=True)
    staging = staging_of(folder, step)
    staging.mkdir()
    return staging


def tidy(run_dir: Path) -> None:
    """Clean up after killed saves before a run goes on, in the one process that holds the run's lock.

    A checkpoint that was moved aside is moved back if no new one of its step was published. All else is removed.
    """
    for folder in (checkpoints_folder(run_dir), milestones_folder(run_dir)):
        # if the disk cannot be written, the next save reports it
        with contextlib.suppress(OSError):
            for aside in folder.glob(f"{_REPLACED}step_*"):
                final = folder / aside.name.removeprefix(_REPLACED)
                if not final.exists():
                    os.rename(aside, final)
            for left in folder.glob(f"{_STAGING}*"):
                if left.is_dir():
                    shutil.rmtree(left, ignore_errors=True)
                else:
                    left.unlink()


def staging_of(folder: Path, step: int) -> Path:
    """Return where the checkpoint of a step is written before it is published in `folder`."""
    return folder / f"{_STAGING}{step_name(step)}"


def seal_and_rename(staging: Path, final: Path, known: Mapping[str, Entry] | None = None) -> None:
    """Seal a folder and rename it to `final`. The arguments are those of `seal` and `publish_folder`."""
    seal(staging, known)
    publish_folder(staging, final, aside=final.with_name(_REPLACED + final.name))


def publish(staging: Path, final: Path, known: Mapping[str, Entry] | None = None) -> None:
    """Make the checkpoint in `staging` the run's latest: seal it, rename it, then replace `latest`, in this order."""
    staging, final = Path(staging), Path(final)
    seal_and_rename(staging, final, known)
    write_atomically(final.parent / LATEST, final.name + "\n")
    for left in final.parent.glob(f"{_STAGING}*"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)


def prune(run_dir: Path, keep: int) -> list[Path]:
    """Remove all but the newest `keep` checkpoints and return the removed ones. A `keep` of 0 removes none.

    The checkpoint that `latest` names is kept, and so is each one whose progress.json asks for it. A folder is renamed
    before it is deleted, so that a half-deleted one never passes for a checkpoint.
    """
    if keep <= 0:
        return []
    kept = {*list_checkpoints(run_dir)[-keep:], named_latest(run_dir)}
    removed = [path for path in list_checkpoints(run_dir) if path not in kept and not _is_kept(path)]
    for path in removed:
        doomed = path.with_name(_PRUNED + path.name)
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    return removed


def _is_kept(checkpoint: Path) -> bool:
    try:
        return bool(read_progress(checkpoint).get("keep"))
    except UserError:
        return False


def bytes_of_newest(run_dir: Path) -> int | None:
    """Return the total size in bytes of the newest checkpoint; None if there is none."""
    for path in reversed(list_checkpoints(run_dir)):
        try:
            return total_bytes(path)
        except UserError:
            continue
    return None


def read_progress(checkpoint: Path) -> dict[str, Any]:
    """Return the content of progress.json: step, tokens and whatever else the run recorded. Raises UserError."""
    return load_object(Path(checkpoint) / "progress.json", expected="an object with step and tokens")


def read_stored_config(folder: Path) -> dict[str, Any]:
    """Return the groups of a config.yaml as stored, with the key names of the version that wrote it.

    Raises:
        UserError: the file cannot be read.
    """
    path = Path(folder) / "config.yaml"
    try:
        groups = load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: unreadable ({first_line(error)})") from None
    if not isinstance(groups, dict | type(None)):
        raise UserError(f"{path}: holds a {type(groups).__name__}, not groups of settings")
    return {str(name): group for name, group in (groups or {}).items()}


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.yaml of a checkpoint or a run directory as plain groups, with the current names of keys."""
    # imported here because it imports OmegaConf, which takes 0.3 s that listing and verifying do not need
    from megatron_ettin.config.overrides import upgrade_keys

    groups = read_stored_config(folder)
    upgrade_keys(groups)
    return groups


def total_bytes(checkpoint: Path) -> int:
    """Return the total size in bytes of the files that integrity.json lists."""
    return sum(entry["bytes"] for entry in read_entries(checkpoint).values())
