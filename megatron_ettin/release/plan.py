"""Hold the request for a release and its result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ettin.convert.verify import Logits
from megatron_ettin.release.chain import ReleaseChain
from megatron_ettin.release.record import ReleaseOptions

WORK = ".work"
"""Folder in the release for what is being made; it is removed at the end."""
DrawCurve = Callable[[list[Path]], bytes]
"""Run directories, phases in order -> a PNG. Raises UserError."""
WriteOrder = Callable[[Path, int, Path], dict[str, Any] | None]
"""(run directory, last step, file to write) -> what was written; None for too many rows. Raises UserError."""


@dataclass(frozen=True)
class ReleasePlan:
    """A request for a release. The callables belong to floors that this room does not see."""

    chain: ReleaseChain
    out: Path
    options: ReleaseOptions
    our_logits: Logits
    write_order: WriteOrder | None
    """None for a release without data order."""
    draw_curve: DrawCurve
    workers: int | None = None
    """Processes; None for as many as cores and memory allow."""
    recheck: bool = False
    """Compare checksums of what is released already, not only its sizes."""
    replace: bool = False
    """Make a revision again where the existing one has other weights."""
    repository: str | None = None
    """OWNER/NAME of the hub, for the code in the card of `main`."""


@dataclass
class ReleaseResult:
    """The outcome of a release."""

    revisions: list[str]
    """Names of all revisions, oldest first."""
    made: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    """Name -> reason."""
    orders: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Phase -> its data order, as release.json describes it."""
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    seconds_each: dict[str, float] = field(default_factory=dict)
    workers: int = 0
