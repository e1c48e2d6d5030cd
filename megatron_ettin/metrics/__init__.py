"""Floor 2: the sinks of a run's metrics: always `metrics.jsonl`, optionally TensorBoard and Weights & Biases.

The trainer hands one flat dict a step to `FanOut.log`.
"""

from megatron_ettin.metrics.record import (
    METRICS_FILE,
    ROLLED_BACK_FILE,
    JsonlSink,
    finite,
    read_last_metrics,
    read_metrics,
)
from megatron_ettin.metrics.sinks import FanOut, Sink, TensorBoardSink
from megatron_ettin.metrics.wandb import WandbIdentity, WandbSink

__all__ = [
    "METRICS_FILE",
    "ROLLED_BACK_FILE",
    "FanOut",
    "JsonlSink",
    "Sink",
    "TensorBoardSink",
    "WandbIdentity",
    "WandbSink",
    "finite",
    "read_last_metrics",
    "read_metrics",
]
