"""Import checkpoint files of the original trainer (Composer's `.pt`); no pickled code runs."""

from megatron_ettin.convert.composer.importing import from_composer

__all__ = ["from_composer"]
