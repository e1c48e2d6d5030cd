"""Push a release folder to a repository of the Hugging Face hub: a branch for each revision, `main` last.

Every upload is one commit, so that no reader sees a partial revision. Files that the server has are not sent again, so
a push that is repeated after an interruption sends only the rest.
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
"""File that the hub makes in each repository; a push neither compares nor deletes it."""


@dataclass(frozen=True)
class PushResult:
    """Names of the branches that a push uploaded, and of those that were up to date (`kept`)."""

    uploaded: list[str]
    kept: list[str]
    url: str


def check_repository(name: str) -> None:
    """Raise UserError if `name` is not a valid OWNER/NAME."""
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
        repository: OWNER/NAME; it is created if it does not exist.
        names: names of the revisions.
        private: whether a new repository is private.

    Raises:
        UserError: there is no token, the hub refuses, or the connection fails.
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
    """Return the exceptions of the hub and its HTTP client: httpx's since huggingface_hub 1.0, OSErrors before."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        import httpx
    except ImportError:
        return (HfHubHTTPError, OSError)
    return (HfHubHTTPError, OSError, httpx.HTTPError)


def _push_branch(api: Any, out: Path, repository: str, name: str) -> bool:
    """Make the branch hold exactly the folder's files, in one commit; return False if it did before."""
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
    """Return whether the hub's file has the bytes of `path`, by sha256 for LFS files, else by git's blob digest."""
    if entry.size != path.stat().st_size:
        return False
    if entry.lfs is not None:
        return bool(sha256(path) == entry.lfs.sha256)
    blob = f"blob {entry.size}\0".encode() + path.read_bytes()
    return bool(hashlib.sha1(blob).hexdigest() == entry.blob_id)
