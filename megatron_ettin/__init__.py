"""megatron_ettin: 3D-parallel pre-training of paired encoders and decoders (the Ettin recipe)."""

__version__ = "0.1.0"
