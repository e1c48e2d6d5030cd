"""Files of a Hugging Face folder, which may have been made by anyone."""

from __future__ import annotations

from pathlib import Path

from megatron_ettin.base.paths import path_in


def hf_file(folder: Path, name: object, named_by: Path | None = None) -> Path:
    """Join a file's name to a Hugging Face folder. Raises UserError for a name or link that leads out of it.

    In the hub's cache (`models--X/snapshots/REVISION`) files are links to `models--X/blobs`: those are followed."""
    here = folder.absolute()
    cached = here.parent.name == "snapshots"
    return path_in(folder, name, named_by or folder, root=here.parents[1] if cached else None)
