"""Measure how often a healthy run's gradient norm is called a spike, under given settings of `resilience`.

  python tools/spike_rate.py [--steps 1000000] [--sigmas S] [--window W] [--ratio R] [RUN...]

Synthetic norms: independent noise, and noise on a slow drift. A RUN's own norms are judged as they are and, to have
more of them, resampled: its distances from the running median, drawn with replacement. The first steps of a run are
judged by half a window.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_ettin.config.operations import ResilienceConfig
from megatron_ettin.faults.anomalies import NORMAL_MAD
from megatron_ettin.metrics.record import METRICS_FILE, read_metrics

# steps judged in one array
CHUNK_STEPS = 20_000
# steps of one period
DRIFT_STEPS = 20_000


def spikes(logs: np.ndarray, settings: ResilienceConfig, window: int) -> int:
    """Count the spikes among log norms [n], each judged by the `window` before it, as `AnomalyDetector` does."""
    count = 0
    for begin in range(window, len(logs), CHUNK_STEPS):
        end = min(begin + CHUNK_STEPS, len(logs))
        before = np.lib.stride_tricks.sliding_window_view(logs[begin - window : end - 1], window)
        middle = np.median(before, axis=1)
        sigma = np.median(np.abs(before - middle[:, None]), axis=1) / NORMAL_MAD
        above = np.maximum(settings.spike_sigmas * sigma, np.log(settings.spike_ratio))
        count += int((logs[begin:end] > middle + above).sum())
    return count


def made_up(steps: int) -> Iterator[tuple[str, np.ndarray]]:
    """Return (name, log norms [steps]) of each synthetic noise."""
    draw = np.random.default_rng(21)
    for deviation in (0.1, 0.3):
        norms = np.abs(1 + deviation * draw.standard_normal(steps))
        yield f"Gaussian, {deviation:.0%} of the mean", np.log(np.maximum(norms, 1e-9))
    for sigma in (0.3, 0.5, 0.7):
        yield f"lognormal, sigma {sigma}", sigma * draw.standard_normal(steps)
    drift = np.log(10) / 2 * np.sin(np.arange(steps) * 2 * np.pi / DRIFT_STEPS)
    yield "lognormal, sigma 0.3, drifting by 10 and back in 20,000 steps", drift + 0.3 * draw.standard_normal(steps)


def recorded(run: Path, steps: int, window: int) -> Iterator[tuple[str, np.ndarray]]:
    """Return (name, log norms) of a run: its own, and its distances from the running median, resampled."""
    norms = [line["grad_norm"] for line in read_metrics(run / METRICS_FILE) if line.get("grad_norm")]
    logs = np.log(norms)
    yield f"{run.name}, as recorded", logs
    before = np.lib.stride_tricks.sliding_window_view(logs[:-1], window)
    distances = logs[window:] - np.median(before, axis=1)
    yield f"{run.name}, redrawn", np.random.default_rng(21).choice(distances, steps)


def rows(args: argparse.Namespace) -> Iterator[str]:
    settings = ResilienceConfig(spike_sigmas=args.sigmas, spike_window=args.window, spike_ratio=args.ratio)
    cases = list(made_up(args.steps))
    for run in args.runs:
        cases += recorded(run, args.steps, args.window)
    for name, logs in cases:
        full, half = (spikes(logs, settings, window) for window in (args.window, args.window // 2))
        yield f"| {name} | {len(logs) - args.window:,} | {full} | {half} |"


def main() -> None:
    default = ResilienceConfig()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN")
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--sigmas", type=float, default=default.spike_sigmas)
    parser.add_argument("--window", type=int, default=default.spike_window)
    parser.add_argument("--ratio", type=float, default=default.spike_ratio)
    args = parser.parse_args()
    print("| gradient norms | steps | spikes, by a full window | by half of one |\n|---|---|---|---|", flush=True)
    for row in rows(args):
        print(row, flush=True)


if __name__ == "__main__":
    main()
