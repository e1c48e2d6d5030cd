"""Checkpoint files of the original trainer (Composer's `.pt`) -> checkpoints of weights; no pickled code runs."""

from megatron_ettin.convert.composer.importing import from_composer

__all__ = ["from_composer"]
