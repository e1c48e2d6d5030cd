"""The session of all sections: device, data and results, which survive an interruption."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PASSED, FAILED, ABSENT = "passed", "failed", "does not run"


class DoesNotRunError(Exception):
    """This host lacks the hardware or a package for an item; the message says which."""


class Results:
    """`FILE.json`: section -> item -> {"state", "says", figures...}. Rewritten after every item."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.items: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else {}

    def has(self, section: str, item: str) -> bool:
        """Return whether an item was checked and did not fail."""
        return self.items.get(section, {}).get(item, {}).get("state") in (PASSED, ABSENT)

    def forget(self, section: str, item: str) -> None:
        if self.items.get(section, {}).pop(item, None) is not None:
            self._write()

    def put(self, section: str, item: str, result: dict[str, Any]) -> None:
        self.items.setdefault(section, {})[item] = result
        self._write()

    def _write(self) -> None:
        partial = self.path.with_name(self.path.name + ".tmp")
        partial.write_text(json.dumps(self.items, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, self.path)


@dataclass
class Session:
    """`overrides`: those of every run. `deadline`: on time.monotonic's clock; no item begins after it."""

    device: str
    data: Path
    work: Path
    results: Results
    sizes: list[str]
    lengths: list[int]
    steps: int
    tokens_a_step: int
    rounds: int
    deadline: float
    overrides: list[str] = field(default_factory=list)

    @property
    def torch_device(self) -> str:
        return "cuda" if self.device == "gpu" else "cpu"

    def shape(self, size: str) -> Any:
        """Return the overrides of the model's shape in every run of this size."""
        from megatron_ettin.config.resolve import parse

        return parse(size, "mlm", "pretrain", overrides=self.overrides).model

    def run(self, section: str, items: dict[str, Callable[[], dict[str, Any]]]) -> None:
        """Check every item that is not done, while time is left.

        An item returns its figures with `says`, one line for people, and `passed`. It raises DoesNotRunError if it
        cannot run here; any other error is its failure.
        """
        for name, item in items.items():
            if self.results.has(section, name):
                continue
            if time.monotonic() > self.deadline:
                print(f"{section}: no time left for {name} and what follows; run again to go on", flush=True)
                return
            began = time.perf_counter()
            try:
                figures = item()
                result = {"state": PASSED if figures.pop("passed", True) else FAILED, **figures}
            except DoesNotRunError as reason:
                result = {"state": ABSENT, "says": str(reason)}
            except Exception as error:
                says = (str(error).strip() or type(error).__name__).splitlines()[-1]
                result = {"state": FAILED, "says": f"{type(error).__name__}: {says}"[:500]}
            result["seconds"] = round(time.perf_counter() - began, 1)
            self.results.put(section, name, result)
            print(f"{section}: {name}: {result['state']}; {result['says']} ({result['seconds']:.0f} s)", flush=True)


def median_seconds(function: Callable[[], Any], device: str, rounds: int, warm_up: int = 3) -> float:
    """Return the median seconds of one call, by the device's own clock if it has one."""
    import statistics

    import torch

    for _ in range(warm_up):
        function()
    seconds = []
    for _ in range(rounds):
        if device == "cpu":
            began = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - began)
            continue
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        function()
        last.record()
        torch.cuda.synchronize()
        seconds.append(first.elapsed_time(last) / 1e3)
    return statistics.median(seconds)
