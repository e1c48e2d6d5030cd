"""Floor 2: the hardware. Only this room names CUDA, Transformer Engine and communication backends."""

from megatron_ettin.platform.device import Platform, detect

__all__ = ["Platform", "detect"]
