"""How often healthy gradient norms are called spikes at the default settings."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_ettin.config.operations import ResilienceConfig
from megatron_ettin.faults.anomalies import AnomalyDetector
from tools.spike_rate import made_up, spikes

DEFAULT = ResilienceConfig()


def test_spikes_of_the_tool_match_the_guard() -> None:
    settings = ResilienceConfig(spike_sigmas=3, spike_window=16, spike_ratio=1.5)
    logs = np.random.default_rng(5).standard_t(3, 400) * 0.3
    norms = np.exp(logs).tolist()
    judged = [
        AnomalyDetector(settings, tuple(norms[step - 16 : step])).judge(3.0, norms[step]) for step in range(16, 400)
    ]
    found = sum(bad is not None for bad in judged)
    assert found > 5
    assert spikes(logs, settings, 16) == found


def test_spikes_far_outliers_are_found() -> None:
    logs = np.random.default_rng(5).standard_normal(2_000) * 0.3
    logs[[500, 900, 901]] += np.log(12)
    assert spikes(logs, DEFAULT, DEFAULT.spike_window) == 3


@pytest.mark.parametrize("window", [128, pytest.param(64, marks=pytest.mark.full)])
def test_spikes_of_lognormal_noise_are_rarer_than_one_in_100_000_steps(window: int) -> None:
    """The widest of the healthy noises, which the mean and standard deviation of the norm called a spike every 370
    steps."""
    logs = np.random.default_rng(5).standard_normal(100_000) * 0.7
    assert spikes(logs, DEFAULT, window) == 0


@pytest.mark.full
def test_spikes_of_healthy_noise_are_rarer_than_one_in_100_000_steps() -> None:
    steps = 300_000
    for name, logs in made_up(steps):
        assert spikes(logs, DEFAULT, DEFAULT.spike_window) < steps / 100_000, name
