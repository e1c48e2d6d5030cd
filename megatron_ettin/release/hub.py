"""Push a release folder to a repository of the Hugging Face hub: a branch a revision, `main` last.

Every upload is one commit, so a reader sees a revision whole or not at all; files that the server has already are not
sent again, so an interrupted push goes on where it stopped.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ettin.base.digests import sha256
from megatron_ettin.base.errors import UserError, first_line
from megatron_ettin.base.paths import path_in
from megatron_ettin.release.build import ORDERS
from megatron_ettin.release.revision import RECORD, read_record

ATTRIBUTES = ".gitattributes"
"""A file of the hub's own."""


@dataclass(frozen=True)
class PushResult:
    """The branches of a push, by name."""

    uploaded: list[str]
    kept: list[str]
    url: str


def check_repository(name: str) -> None:
    """Raise UserError for a name that no repository can have, before any work is done."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--push {name}: {first_line(error)}") from None
    if "/" not in name:
        raise UserError(f"--push {name}: give OWNER/NAME")


def push(out: Path, repository: str, names: list[str], private: bool) -> PushResult:
    """Push the revisions `names` and then `main` to the hub.

    Args:
        out: the release folder.
        repository: OWNER/NAME; it is made where it is missing.
        names: revisions.
        private: whether a new repository is private.

    Raises:
        UserError: the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalTokenNotFoundError

    api = HfApi()
    done = PushResult([], [], "")
    try:
        url = str(api.create_repo(repository, private=private, exist_ok=True))
        branches = {branch.name for branch in api.list_repo_refs(repository).branches}
        for name in [*names, "main"]:
            if name not in branches:
                api.create_branch(repository, branch=name, exist_ok=True)
            changed = _push_branch(api, out, repository, name)
            (done.uploaded if changed else done.kept).append(name)
    except LocalTokenNotFoundError:
        raise UserError(f"--push {repository}: no token; `hf auth login` or HF_TOKEN gives one") from None
    except _connection_errors() as error:
        raise UserError(
            f"--push {repository}: {first_line(error)}; {len(done.uploaded) + len(done.kept)} of {len(names) + 1}"
            " revisions are there; run it again to go on"
        ) from None
    return PushResult(done.uploaded, done.kept, url)


def _connection_errors() -> tuple[type[Exception], ...]:
    """Return the errors of the hub and of the library's HTTP client: httpx since 1.0, before it one of OSErrors."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        import httpx
    except ImportError:
        return (HfHubHTTPError, OSError)
    return (HfHubHTTPError, OSError, httpx.HTTPError)


def _push_branch(api: Any, out: Path, repository: str, name: str) -> bool:
    """Make the branch hold exactly the folder's files, in one commit; return False where it does already."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    folder = out / name
    files = sorted([*read_record(folder)["files"], RECORD])
    wanted = {file: path_in(folder, file, folder / RECORD, nested=True) for file in files}
    if name == "main" and (out / ORDERS).is_dir():
        wanted |= {f"{ORDERS}/{path.name}": path for path in sorted((out / ORDERS).glob("*.parquet"))}
    there = {
        entry.path: entry
        for entry in api.list_repo_tree(repository, recursive=True, revision=name)
        if hasattr(entry, "blob_id") and entry.path != ATTRIBUTES
    }
    changed = [file for file, path in wanted.items() if not (file in there and _same(path, there[file]))]
    operations: list[Any] = [CommitOperationAdd(file, wanted[file]) for file in changed]
    operations += [CommitOperationDelete(file) for file in sorted(set(there) - set(wanted))]
    if operations:
        message = f"{name}: weights, tokenizer, card and parity record"
        api.create_commit(repository, operations, commit_message=message, revision=name)
    return bool(operations)


def _same(path: Path, entry: Any) -> bool:
    """Return whether the hub holds these bytes: by sha256 for large files, by git's own digest for small ones."""
    if entry.size != path.stat().st_size:
        return False
    if entry.lfs is not None:
        return bool(sha256(path) == entry.lfs.sha256)
    blob = f"blob {entry.size}\0".encode() + path.read_bytes()
    return bool(hashlib.sha1(blob).hexdigest() == entry.blob_id)
