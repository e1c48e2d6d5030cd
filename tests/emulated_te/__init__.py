"""Transformer Engine without a GPU: its own Python, unmodified, over kernels computed by torch on a CPU.

This lets tests run TE's side of the layers: the arguments that core passes to it, what it refuses, the tensors of its
FP8 state, what it saves for backward, how its quantized weights behave. All of that is Python.
Only its extension module (`transformer_engine_torch`) is replaced, function by function, by the formulae of its
kernels: `extension.py`. FP8 numbers are rounded as on a device, so that losses are those of FP8; speed, launches,
streams and cuDNN's own limits are not emulated. A function that is not emulated raises NotImplementedError."""
