"""Runs of `ettin train` as users start them: losses by layers and precision, checkpoints, exports, throughput."""

from __future__ import annotations

import functools
import json
import shutil
import statistics
import subprocess
import sys
from typing import Any

from gpu_checks.session import DoesNotRunError, Session

FP8 = ("fp8-current", "fp8-delayed", "fp8-blockwise")
# relative difference from bf16 of the mean loss of a run's last tenth
PRECISION_TOLERANCE = 0.005
OBJECTIVES = ("mlm", "clm")


def ettin(*arguments: str) -> str:
    """Return a command's output. Raises DoesNotRunError with its one line if it refuses, RuntimeError if it fails."""
    done = subprocess.run([sys.executable, "-m", "megatron_ettin", *arguments], capture_output=True, text=True)
    if done.returncode == 2:
        raise DoesNotRunError(done.stderr.strip().splitlines()[-1].partition(": ")[2])
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or done.stdout.strip() or str(done.returncode))[-2000:])
    return done.stdout


def train(
    session: Session, name: str, size: str, overrides: list[str], objective: str = "mlm", length: int = 0, rows: int = 0
) -> list[dict[str, Any]]:
    """Train in `work/name` and return the metrics: one micro-batch per step, at a rate that learns immediately.

    An existing folder is continued.
    """
    length = length or session.lengths[0]
    rows = rows or max(1, session.tokens_a_step // length)
    folder, tokens = session.work / name, session.tokens_a_step
    ettin(
        *("train", "--size", size, "--objective", objective, "--phase", "pretrain", "--run-dir", str(folder)),
        *(f"data.mixture={session.data}", f"data.seq_len={length}", f"runtime.device={session.device}"),
        *(
            f"batch.global_batch_rows={rows}",
            f"batch.micro_batch_rows={max(1, tokens // length)}",
            "batch.warmup_tokens=0",
        ),
        *("schedule.name=wsd", f"schedule.warmup_tokens={20 * tokens}", "schedule.decay_tokens=0", "optim.lr=1e-3"),
        *("checkpoint.every_tokens=null", "checkpoint.weights_every_tokens=null", "metrics.tensorboard=false"),
        *(*session.overrides, *overrides),
    )
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(lines: list[dict[str, Any]]) -> list[float]:
    return [line["loss"] for line in lines]


def layers(session: Session) -> None:
    """Compare Transformer Engine's layers with core's: they differ by bf16's rounding."""

    def item(objective: str) -> dict[str, Any]:
        size, steps = session.sizes[0], "run.steps=20"
        wide = train(session, f"layers-{objective}-fp32", size, [steps, "precision.name=fp32"], objective)
        half = train(session, f"layers-{objective}-bf16", size, [steps, "precision.name=bf16"], objective)
        apart = max(abs(a - b) / b for a, b in zip(losses(half), losses(wide), strict=True))
        return {"says": f"bf16 within {apart:.2%} of fp32 over 20 steps", "passed": apart <= 0.02, "apart": apart}

    session.run(
        "layers", {f"{objective}, bf16 beside fp32": functools.partial(item, objective) for objective in OBJECTIVES}
    )


def precisions(session: Session) -> None:
    """Compare each precision's curve with bf16's on the same rows."""

    def curve(size: str, name: str) -> list[float]:
        actual = train(session, f"curve-{size}-{name}", size, [f"run.steps={session.steps}", f"precision.name={name}"])
        return losses(actual)

    def item(size: str, name: str) -> dict[str, Any]:
        expected, actual = curve(size, "bf16"), curve(size, name)
        tenth = max(1, session.steps // 10)
        last, bf16 = statistics.fmean(actual[-tenth:]), statistics.fmean(expected[-tenth:])
        fell = expected[0] - bf16
        return {
            "says": f"loss {last:.4f}, bf16 {bf16:.4f} ({last / bf16 - 1:+.2%}), begun at {expected[0]:.2f}",
            "passed": last <= bf16 * (1 + PRECISION_TOLERANCE) and fell > 0.5,
            "losses": actual,
            "bf16_losses": expected,
        }

    def kept(size: str, name: str) -> dict[str, Any]:
        """Check that weights stored in FP8 equal the casts that products would make of the weights."""
        overrides = [f"run.steps={session.steps}", f"precision.name={name}", "precision.fp8_weights=true"]
        actual, expected = losses(train(session, f"curve-{size}-{name}-kept", size, overrides)), curve(size, name)
        apart = max(abs(a - b) / b for a, b in zip(actual, expected, strict=True))
        says = "the same losses" if actual == expected else f"within {apart:.2%} at every step"
        return {"says": f"{says} as with 16-bit weights", "passed": apart <= PRECISION_TOLERANCE, "apart": apart}

    items = {f"{size} {name}": functools.partial(item, size, name) for size in session.sizes for name in ("fp32", *FP8)}
    items |= {
        f"{size} {name}, fp8_weights": functools.partial(kept, size, name) for size in session.sizes for name in FP8
    }
    session.run("precisions", items)


def checkpoints(session: Session) -> None:
    """Resume with FP8's state, and from one precision and device to another."""
    size = session.sizes[0]

    def resumed(name: str) -> dict[str, Any]:
        overrides = [f"precision.name={name}", "runtime.deterministic=true"]
        uninterrupted = train(session, f"resume-{name}-whole", size, [*overrides, "run.steps=10"])
        train(session, f"resume-{name}", size, [*overrides, "run.steps=5"])
        both = train(session, f"resume-{name}", size, [*overrides, "run.steps=10"])
        same = losses(both) == losses(uninterrupted)
        return {
            "says": "the same bits" if same else f"{losses(both)[5:]} against {losses(uninterrupted)[5:]}",
            "passed": same,
        }

    def across(first: list[str], second: list[str]) -> dict[str, Any]:
        name = f"across-{first[0].split('=')[1]}-{second[0].split('=')[1]}"
        uninterrupted = train(session, f"{name}-whole", size, [*first, "run.steps=10"])
        train(session, name, size, [*first, "run.steps=5"])
        both = train(session, name, size, [*second, "run.steps=10"])
        apart = max(abs(a - b) / b for a, b in zip(losses(both), losses(uninterrupted), strict=True))
        return {"says": f"within {apart:.2%} of the run that never changed", "passed": apart <= 0.02}

    bf16, current, delayed = (["precision.name=" + name] for name in ("bf16", "fp8-current", "fp8-delayed"))
    items: dict[str, Any] = {f"{name} goes on": functools.partial(resumed, name) for name in ("bf16", *FP8)}
    items |= {
        "bf16 to fp8-current": functools.partial(across, bf16, current),
        "fp8-current to bf16": functools.partial(across, current, bf16),
        "fp8-delayed to bf16": functools.partial(across, delayed, bf16),
        "this device to the CPU": functools.partial(across, bf16, ["runtime.device=cpu"]),
        "the CPU to this device": functools.partial(
            across, ["runtime.device=cpu"], [f"runtime.device={session.device}"]
        ),
    }
    session.run("checkpoints", items)


def export(session: Session) -> None:
    """Export runs of this device as folders of transformers, and verify them."""

    def item(objective: str) -> dict[str, Any]:
        name = f"export-{objective}"
        train(session, name, session.sizes[0], ["run.steps=20", "precision.name=bf16"], objective)
        out = session.work / f"{name}-hf"
        shutil.rmtree(out, ignore_errors=True)
        ettin("convert", "to-hf", str(session.work / name), str(out))
        parity = json.loads((out / "parity.json").read_text())
        return {"says": f"largest difference of logits {parity['max_abs_logit_difference']:.1e}", "parity": parity}

    session.run("export", {objective: functools.partial(item, objective) for objective in OBJECTIVES})


def throughput(session: Session, size: str) -> None:
    """Return tokens per second of steps of four micro-batches of packed rows."""

    def item(objective: str, length: int, precision: str) -> dict[str, Any]:
        name = f"speed-{size}-{objective}-{length}-{precision}"
        shutil.rmtree(session.work / name, ignore_errors=True)
        rows = 4 * max(1, session.tokens_a_step // length)
        overrides = [f"precision.name={precision}", "run.steps=8"]
        lines = train(session, name, size, overrides, objective, length, rows)[3:]
        shutil.rmtree(session.work / name / "checkpoints", ignore_errors=True)
        speeds = [line["tokens_per_second"] for line in lines]
        middle, mfu, memory = statistics.median(speeds), lines[-1]["mfu"], lines[-1]["peak_memory_bytes"]
        share = f", MFU {statistics.median(line['mfu'] for line in lines):.1%} of the data sheet's bf16" if mfu else ""
        return {
            "says": f"{middle:,.0f} tokens/s ({min(speeds):,.0f} to {max(speeds):,.0f}){share},"
            f" {memory / 2**30:.1f} GiB",
            "tokens_per_second": middle,
            "step_seconds": statistics.median(line["step_seconds"] for line in lines),
            "tflops_per_second": statistics.median(line["tflops_per_second"] for line in lines),
            "micro_batches": 4,
            "peak_memory_bytes": memory,
        }

    items = {
        f"{objective} at {length}, {precision}": functools.partial(item, objective, length, precision)
        for precision in ("bf16", *FP8)
        for length in session.lengths
        for objective in OBJECTIVES
    }
    session.run(f"throughput-{size}", items)
