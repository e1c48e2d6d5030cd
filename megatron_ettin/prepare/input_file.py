"""One input of `ettin prepare`, as the plan, the readers and prepare.json know it."""

from __future__ import annotations

from dataclasses import dataclass

# an input byte counts as so many of text, where compression or format make it more; by compression, else by kind
GROWTH = {"gzip": 4, "zstd": 4, "bzip2": 4, "xz": 4, "parquet": 3}


@dataclass(frozen=True)
class InputFile:
    """Strings and numbers only: `dataclasses.asdict` and the constructor take it to JSON and back."""

    url: str  # a path, or a URL of fsspec's
    name: str  # what the dataset calls it: the INPUT's own name, then the path within it
    source: str  # the INPUT it came by
    kind: str  # of READERS
    compression: str | None
    bytes: int
    modified: str = ""  # changes when the content does: nanoseconds, an ETag; empty where the file system says nothing
    detail: str = ""  # JSON: what its directory's index says of it

    @property
    def growth(self) -> int:
        return GROWTH.get(self.compression or self.kind, 1)

    @property
    def weight_bytes(self) -> int:
        return self.bytes * self.growth


@dataclass(frozen=True)
class Segment:
    """What of a file belongs to bytes [start, end)."""

    file: InputFile
    start: int
    end: int

    @property
    def is_whole(self) -> bool:
        return self.start == 0 and self.end == self.file.bytes
