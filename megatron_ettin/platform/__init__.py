"""Floor 2: the hardware a run stands on. Every name of CUDA, Transformer Engine and communication backends is here."""

from megatron_ettin.platform.device import Platform, detect

__all__ = ["Platform", "detect"]
