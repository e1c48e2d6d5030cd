"""Describe the degrees of parallelism of a run as a value that needs no process group."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ettin.config.layouts import check_layout, stage_layers
from megatron_ettin.config.schema import Config


@dataclass(frozen=True)
class Topology:
    """Degrees of every axis over all ranks. In core's order of ranks, tp varies fastest, then cp, dp and pp."""

    world: int
    tp: int
    pp: int
    vpp: int
    cp: int
    dp: int
    layers: tuple[int, ...]
    """Number of layers of each of the pp x vpp stages, in model order."""

    @classmethod
    def of(cls, config: Config, world: int) -> Topology:
        """Return the topology of a run on `world` ranks. Raises UserError where they do not divide."""
        parallel = config.parallel
        dp = check_layout(config, world)
        return cls(world, parallel.tp, parallel.pp, parallel.vpp, parallel.cp, dp, tuple(stage_layers(config)))

    def coords(self, rank: int) -> dict[str, int]:
        """Return the coordinate of a rank on each axis."""
        tp, rest = rank % self.tp, rank // self.tp
        cp, rest = rest % self.cp, rest // self.cp
        dp, pp = rest % self.dp, rest // self.dp
        return {"tp": tp, "cp": cp, "dp": dp, "pp": pp}

    @property
    def pipeline_layout(self) -> str | None:
        """Core's pipeline layout, e.g. `Et*4|t*3L`; None for one stage."""
        if len(self.layers) == 1:
            return None
        stages = [f"t*{count}" if count > 1 else "t" for count in self.layers]
        stages[0], stages[-1] = "E" + stages[0], stages[-1] + "L"
        return "|".join(stages)

    def __str__(self) -> str:
        named = {"tp": self.tp, "pp": self.pp, "vpp": self.vpp, "cp": self.cp, "dp": self.dp}
        degrees = " ".join(f"{axis} {size}" for axis, size in named.items() if size > 1 or axis == "dp")
        return degrees + (f", layers {'+'.join(map(str, self.layers))}" if len(self.layers) > 1 else "")
