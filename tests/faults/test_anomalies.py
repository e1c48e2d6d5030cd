"""The limit above which a gradient norm is a spike, and how often healthy norms are called one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_ettin.cli.main import main
from megatron_ettin.config.operations import ResilienceConfig
from megatron_ettin.faults.anomalies import AnomalyDetector
from tests.train.runs import command
from tools.spike_rate import made_up, spikes

DEFAULT = ResilienceConfig()


def test_anomaly_detector_limit_matches_numpy() -> None:
    norms = np.random.default_rng(7).lognormal(0.3, 0.4, 128)
    guard = AnomalyDetector(ResilienceConfig(), tuple(norms.tolist()))
    logs = np.log(norms)
    middle = np.median(logs)
    limit = np.exp(middle + 6 * np.median(np.abs(logs - middle)) / 0.67448975)
    assert guard.limit() == pytest.approx(limit, rel=1e-7)
    assert guard.judge(3.0, limit * 0.999) is None
    spike = guard.judge(3.0, limit * 1.001)
    assert spike is not None
    assert spike.why.startswith("gradient norm ")
    assert spike.action == "warn"


def test_anomaly_detector_quiet_norm_below_the_ratio_is_no_spike() -> None:
    norms = np.random.default_rng(7).normal(1, 0.01, 128)
    guard = AnomalyDetector(ResilienceConfig(), tuple(norms.tolist()))
    assert guard.limit() == pytest.approx(5 * np.median(norms), rel=1e-6)


def test_anomaly_detector_remembers_finite_norms_of_one_window() -> None:
    recent = (1.0,) * 128
    guard = AnomalyDetector(ResilienceConfig(), recent)
    assert guard.after(3.0, 2.0) == (*recent[1:], 2.0)
    assert guard.after(float("nan"), 1.0) == recent
    assert guard.after(3.0, float("inf")) == recent


@pytest.mark.parametrize("norms", [(1.0,) * 63, (), (0.0,) * 64, (1e-300, 1e300) * 64])
def test_anomaly_detector_without_a_usable_window_finds_no_spike(norms: tuple[float, ...]) -> None:
    assert AnomalyDetector(ResilienceConfig(), norms).judge(1e9, 0.0) is None


def test_anomaly_detector_with_spikes_ignored_reports_none() -> None:
    assert AnomalyDetector(ResilienceConfig(on_spike="ignore"), (1.0,) * 128).judge(3.0, 1e9) is None


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (
            "resilience.on_spike=jump",
            "resilience.on_spike: 'jump' does not exist; it is one of warn, skip, stop, ignore",
        ),
        ("resilience.spike_window=3", "resilience.spike_window: 3 is not allowed; it must be at least 4"),
        ("resilience.spike_sigmas=0", "resilience.spike_sigmas: 0.0 is not allowed; it must be above 0"),
        ("resilience.spike_ratio=0.5", "resilience.spike_ratio: 0.5 is not allowed; it must be at least 1"),
        ("resilience.max_skips_in_row=-1", "resilience.max_skips_in_row: -1 is not allowed; it must be 0"),
        (
            "resilience.check_replicas_every=0",
            "resilience.check_replicas_every: 0 is not allowed; it must be at least 1",
        ),
    ],
)
def test_resilience_invalid_setting_is_refused(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], word: str, message: str
) -> None:
    assert main(command(tmp_path, corpus, "mlm", [word])) == 2
    assert message in capsys.readouterr().err


def test_spikes_of_the_tool_match_the_anomaly_detector() -> None:
    settings = ResilienceConfig(spike_sigmas=3, spike_window=16, spike_ratio=1.5)
    logs = np.random.default_rng(5).standard_t(3, 400) * 0.3
    norms = np.exp(logs).tolist()
    judged = [
        AnomalyDetector(settings, tuple(norms[step - 16 : step])).judge(3.0, norms[step]) for step in range(16, 400)
    ]
    count = sum(bad is not None for bad in judged)
    assert count > 5
    assert spikes(logs, settings, 16) == count


def test_spikes_far_outliers_are_counted() -> None:
    logs = np.random.default_rng(5).standard_normal(2_000) * 0.3
    logs[[500, 900, 901]] += np.log(12)
    assert spikes(logs, DEFAULT, DEFAULT.spike_window) == 3


@pytest.mark.parametrize("window", [128, pytest.param(64, marks=pytest.mark.full)])
def test_spikes_of_lognormal_noise_are_rarer_than_one_in_100_000_steps(window: int) -> None:
    """Judge the widest healthy noise. The former rule, by the norm's mean and deviation, found a spike every 370
    steps."""
    logs = np.random.default_rng(5).standard_normal(100_000) * 0.7
    assert spikes(logs, DEFAULT, window) == 0


@pytest.mark.full
def test_spikes_of_healthy_noise_are_rarer_than_one_in_100_000_steps() -> None:
    steps = 300_000
    for name, logs in made_up(steps):
        assert spikes(logs, DEFAULT, DEFAULT.spike_window) < steps / 100_000, name
