"""Floor 2: the sinks of a run's metrics: always `metrics.jsonl`, optionally TensorBoard and Weights & Biases.

The trainer hands one flat dict a step to `FanOut.log`.
"""
