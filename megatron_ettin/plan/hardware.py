"""List the GPU models that a plan can be made for: those of gpus.yaml, overridden by a user's own file."""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

from megatron_ettin.base.errors import UserError, nearest
from megatron_ettin.base.parsing import read_yaml

MAY_BE_ZERO = ("fp8_tflops", "link_us", "network_us")
# of any figure, so that none becomes infinite in another unit
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
    """Latency of a ring's step to the next GPU of the host; these are those of NCCL's own model of its "Simple"
    protocol.
    """
    network_us: float = 14.0
    """Latency of a ring's step to the next host."""

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
        """Return the bytes per second that pass each point of a ring.

        Rings between hosts use the network links of all of a host's GPUs that are in them.

        Args:
            ranks: GPUs in the ring.
            stride: every how many GPUs one is in the ring.
            node: GPUs per host.
        """
        inside = max(1, min(ranks, node // stride))
        if ranks <= inside:
            return self.link_gb_per_s * 1e9
        return min(self.link_gb_per_s, inside * self.network_gb_per_s) * 1e9

    def ring_latency(self, ranks: int, stride: int, node: int) -> float:
        """Return the seconds that a first byte takes around such a ring: a gather or a scatter of next to nothing."""
        nodes = self._nodes(ranks, stride, node)
        return ((ranks - nodes) * self.link_us + (nodes - 1) * self.network_us) * 1e-6

    def reduce_latency(self, ranks: int, stride: int, node: int) -> float:
        """Return the latency of an all-reduce: twice around the ring, or a tree of hosts where that is faster."""
        nodes = self._nodes(ranks, stride, node)
        chain, levels = -(-ranks // nodes) - 1, math.ceil(math.log2(nodes))
        tree = 2 * (chain * self.link_us + levels * self.network_us) * 1e-6
        return min(2 * self.ring_latency(ranks, stride, node), tree)

    def _nodes(self, ranks: int, stride: int, node: int) -> int:
        return -(-ranks // max(1, min(ranks, node // stride)))


def find_gpu(name: str, own_file: Path | None = None) -> GpuSpec:
    """Return the GPU model of that name. Raises UserError with the names that there are."""
    table = read_table(TABLE) | (read_table(own_file) if own_file is not None else {})
    wanted = name.lower()
    gpu = table.get(ALIASES.get(wanted, wanted))
    if gpu is None:
        raise UserError(
            f"--gpu {name}: not known{nearest(wanted, [*ALIASES, *table])}; known: {', '.join(table)} (or --gpus-file)"
        )
    return gpu


def read_table(path: Path) -> dict[str, GpuSpec]:
    """Read GPU models from a file. Raises UserError naming the model and key that are wrong."""
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
