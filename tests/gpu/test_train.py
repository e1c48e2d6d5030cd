"""The same runs on a CUDA device as on the CPU, with Transformer Engine's layers where it is installed; else skipped."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.train.runs import Trained, command, read


def have_gpu() -> bool:
    """Return whether torch sees a device. Without a driver, torch is not imported, because that takes seconds."""
    if not (Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi")):
        return False
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not have_gpu(), reason="needs a CUDA device")]
# head size 64 and widths that every kernel and FP8 recipe supports; rows longer than the window
SHAPE = [
    "model.hidden_size=256",
    "model.ffn_hidden_size=384",
    "model.num_attention_heads=4",
    "model.encoder_window=64",
    "model.decoder_window_keys=64",
    "data.seq_len=256",
    "precision.name=bf16",
]


def run(directory: Path, corpus: Path, objective: str, device: str, overrides: list[str]) -> Trained:
    line = [*command(directory, corpus, objective, [*SHAPE, *overrides]), f"runtime.device={device}"]
    done = subprocess.run([sys.executable, "-m", "megatron_ettin", *line], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return read(directory)


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Trained]:
    """Return a function that trains twenty steps of an objective on a device in a precision, and caches the run."""
    made: dict[tuple[str, str, str], Trained] = {}

    def get(objective: str, device: str, precision: str = "bf16") -> Trained:
        if (objective, device, precision) not in made:
            overrides = ["run.steps=20", f"precision.name={precision}"]
            folder = tmp_path_factory.mktemp("whole")
            made[objective, device, precision] = run(folder, corpus, objective, device, overrides)
        return made[objective, device, precision]

    return get


@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_gpu_loss_curve_follows_cpu(trained, objective: str) -> None:
    """Train twenty steps in bf16; every loss is within 2 % of the CPU's local layers."""
    here, there = (trained(objective, device) for device in ("gpu", "cpu"))
    assert here.column("rows") == there.column("rows")
    assert here.column("loss") == pytest.approx(there.column("loss"), rel=0.02)
    assert here.column("loss")[0] - here.column("loss")[-1] >= 1


@pytest.mark.parametrize(("first", "second"), [("cpu", "gpu"), ("gpu", "cpu")])
def test_checkpoint_resumed_on_other_device_follows_first(
    corpus: Path, tmp_path: Path, trained, first: str, second: str
) -> None:
    """Train ten steps on one device and ten on the other; the checkpoint has no bias of a norm and no pickled state."""
    run(tmp_path / "both", corpus, "mlm", first, ["run.steps=10"])
    both = run(tmp_path / "both", corpus, "mlm", second, ["run.steps=20"])
    assert both.column("loss") == pytest.approx(trained("mlm", first).column("loss"), rel=0.02)
    assert not any("layer_norm_bias" in name or "_extra_state" in name for name in both.weights())


@pytest.mark.parametrize("precision", ["fp8-delayed", "fp8-current", "fp8-blockwise"])
def test_gpu_fp8_loss_curve_follows_bf16(trained, precision: str) -> None:
    expected = trained("mlm", "gpu").column("loss")
    assert trained("mlm", "gpu", precision).column("loss") == pytest.approx(expected, rel=0.05)


def test_gpu_deterministic_run_repeats_losses_exactly(corpus: Path, tmp_path: Path) -> None:
    overrides = ["run.steps=10", "runtime.deterministic=true"]
    twice = [run(tmp_path / name, corpus, "clm", "gpu", overrides) for name in ("first", "second")]
    assert json.dumps(twice[0].column("loss")) == json.dumps(twice[1].column("loss"))
