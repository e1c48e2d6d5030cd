"""Transformer Engine without a GPU: its own Python, unmodified, over kernels computed by torch on a CPU.

So tests run TE's side of the layers, which is Python: the arguments that core passes, TE's refusals, the tensors of its
FP8 state, the tensors saved for backward, and the behaviour of quantized weights.
Only its extension module (`transformer_engine_torch`) is replaced, function by function, by the formulae of its
kernels: `extension.py`. FP8 numbers are rounded as on a device, so that losses are those of FP8; speed, launches,
streams and cuDNN's own limits are not emulated. A function that is not emulated raises NotImplementedError."""
