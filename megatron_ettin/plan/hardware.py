"""List the GPU models that a plan can be made for: those of gpus.yaml, overridden by a user's own file."""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

from megatron_ettin.base.errors import UserError, nearest
from megatron_ettin.base.parsing import read_yaml

MAY_BE_ZERO = ("fp8_tflops", "link_us", "network_us")
# largest value of a GPU table, so that none becomes infinite when its unit is converted
LARGEST = 1e12
TABLE = Path(__file__).with_name("gpus.yaml")
ALIASES = {"h100": "h100-sxm", "a100-80gb": "a100", "h200-sxm": "h200"}


@dataclass(frozen=True)
class GpuSpec:
    """A GPU model and its usual host; see gpus.yaml for the units."""

    name: str
    bf16_tflops: float
    fp8_tflops: float
    memory_gib: float
    memory_tb_per_s: float
    link_gb_per_s: float
    network_gb_per_s: float
    gpus_per_node: int
    link_us: float = 3.4
    """Microseconds of a ring's step to the next GPU of the host. Both defaults are those of NCCL's own model of its
    "Simple" protocol.
    """
    network_us: float = 14.0
    """Microseconds of a ring's step to the next host."""

    @property
    def flops(self) -> float:
        """Return the operations per second at the dense bf16 peak."""
        return self.bf16_tflops * 1e12

    @property
    def memory_bytes(self) -> int:
        """Return the size of the memory."""
        return int(self.memory_gib * 2**30)

    @property
    def bytes_per_second(self) -> float:
        """Return the bandwidth of the memory."""
        return self.memory_tb_per_s * 1e12

    def ring_rate(self, ranks: int, stride: int, node: int) -> float:
        """Return the bandwidth of a ring in bytes per second, at its slowest link.

        A ring between hosts uses the network links of all its GPUs on a host.

        Args:
            ranks: GPUs in the ring.
            stride: distance of the ring's GPUs in the order of ranks; 1: adjacent.
            node: GPUs per host.
        """
        inside = max(1, min(ranks, node // stride))
        if ranks <= inside:
            return self.link_gb_per_s * 1e9
        return min(self.link_gb_per_s, inside * self.network_gb_per_s) * 1e9

    def ring_latency(self, ranks: int, stride: int, node: int) -> float:
        """Return the seconds of a gather or scatter of almost no bytes over a ring (arguments: see `ring_rate`)."""
        nodes = self._nodes(ranks, stride, node)
        return ((ranks - nodes) * self.link_us + (nodes - 1) * self.network_us) * 1e-6

    def reduce_latency(self, ranks: int, stride: int, node: int) -> float:
        """Return the seconds of an all-reduce of almost no bytes, over the ring or, if faster, a tree of hosts."""
        nodes = self._nodes(ranks, stride, node)
        chain, levels = -(-ranks // nodes) - 1, math.ceil(math.log2(nodes))
        tree = 2 * (chain * self.link_us + levels * self.network_us) * 1e-6
        return min(2 * self.ring_latency(ranks, stride, node), tree)

    def _nodes(self, ranks: int, stride: int, node: int) -> int:
        return -(-ranks // max(1, min(ranks, node // stride)))


def find_gpu(name: str, own_file: Path | None = None) -> GpuSpec:
    """Return the GPU model `name` of `own_file` or gpus.yaml. Raises UserError with the names that are known."""
    table = read_table(TABLE) | (read_table(own_file) if own_file is not None else {})
    wanted = name.lower()
    gpu = table.get(ALIASES.get(wanted, wanted))
    if gpu is None:
        raise UserError(
            f"--gpu {name}: not known{nearest(wanted, [*ALIASES, *table])}; known: {', '.join(table)} (or --gpus-file)"
        )
    return gpu


def read_table(path: Path) -> dict[str, GpuSpec]:
    """Read GPU models from a YAML file, by lower-case name. Raises UserError naming the wrong model and key."""
    content = read_yaml(path, f"--gpus-file {path}")
    if not isinstance(content, dict):
        raise UserError(f"--gpus-file {path}: expected a mapping of GPU names")
    keys = {one.name: one.default is MISSING for one in fields(GpuSpec) if one.name != "name"}
    needed = [key for key, is_needed in keys.items() if is_needed]
    table = {}
    for name, values in content.items():
        if not isinstance(values, dict) or not set(needed) <= set(values) <= set(keys):
            others = ", ".join(sorted(set(keys) - set(needed)))
            raise UserError(f"--gpus-file {path}: {name}: needs {', '.join(needed)}; may have {others}")
        for key, value in values.items():
            usable = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= LARGEST
            if not usable or (value == 0 and key not in MAY_BE_ZERO):
                raise UserError(
                    f"--gpus-file {path}: {name}.{key}: {value!r} is not a number above 0, up to {LARGEST:g}"
                )
            if key == "gpus_per_node" and not isinstance(value, int):
                raise UserError(f"--gpus-file {path}: {name}.{key}: {value!r} is not a whole number")
        table[str(name).lower()] = GpuSpec(str(name).lower(), **values)
    return table
