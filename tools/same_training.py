"""Prove that a change does not alter training: compare the same small runs of two checkouts bit for bit.

    python tools/same_training.py run --checkout . --out after
    python tools/same_training.py compare before after

`run` prepares a dataset and trains, exports and lists the order of every case below with the package of one checkout.
`compare` compares two such folders: the dataset's files, each step's figures, each checkpoint's files, the exported
files and the order tables. It leaves out files that hold a time, a save's id or names of keys (OTHER_EACH_TIME).

`run --resume-from BEFORE` also resumes from the other checkout's checkpoints, under the layout of the next case, so
that old checkpoints are known to load. Both folders must be made on one host, because other CPUs round differently.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

TINY = (
    "model.num_layers=4 model.hidden_size=64 model.ffn_hidden_size=96 model.num_attention_heads=4 "
    "model.vocab_size=320 model.encoder_window=8 model.decoder_window_keys=8 data.seq_len=64 batch.global_batch_rows=8 "
    "batch.micro_batch_rows=2 batch.warmup_tokens=0 optim.lr=3e-3 schedule.name=constant schedule.warmup_tokens=0 "
    "run.device=cpu run.deterministic=true metrics.tensorboard=false checkpoint.every_tokens=null"
)
VOCABULARY = "reader model encoder decoder token row follows predicts learns packs the a every next hidden layer"
STEPS = 6
FP32 = "precision.name=fp32"
DROPOUT = "model.attention_output_dropout=0.1"
# name: ranks, objective, `key=value` overrides, by names and forms that older checkouts know too
CASES: dict[str, tuple[int, str, str]] = {
    "mlm-tp2": (2, "mlm", f"{FP32} parallel.tp=2 {DROPOUT}"),
    "clm-pp2": (2, "clm", f"{FP32} parallel.pp=2 optim.name=adamw optim.clip_grad=0.5 {DROPOUT}"),
    "mlm-dp2": (2, "mlm", f"{FP32} parallel.overlap=true parallel.distributed_optimizer=true"),
    "clm-tp2-pp2": (4, "clm", f"{FP32} parallel.tp=2 parallel.pp=2 parallel.sequence_parallel=true {DROPOUT}"),
    "mlm-cp2": (2, "mlm", f"{FP32} parallel.cp=2 data.skip=8:16"),
    "clm-vp2": (2, "clm", f"{FP32} parallel.pp=2 parallel.vp=2"),
    "mntp": (1, "mntp", f"{FP32} {DROPOUT}"),
    "hybrid-dp2": (2, "hybrid_mntp", f"{FP32} data.clm_fraction=0:0.8,1500:0.3"),
    "mlm-padded": (1, "mlm", f"{FP32} data.batching=padded {DROPOUT}"),
    "clm-muon": (2, "clm", f"{FP32} optim.name=muon parallel.distributed_optimizer=false"),
    "mlm-recompute": (1, "mlm", f"{FP32} parallel.recompute=full"),
    "mlm-zero": (2, "mlm", f"{FP32} parallel.engine=deepspeed parallel.zero_stage=1"),
    "clm-bf16": (1, "clm", "precision.name=bf16"),
}
# keys of a step's line that depend on time and host, so that no other run repeats them
OF_THE_MACHINE = {"time", "seconds", "tokens_per_s", "mfu", "tflops", "memory", "data_wait", "wait", "samples_per_s"}

# inputs.json has the text's time, .metadata the id of a save; the others hold digests of these, or names of keys
OTHER_EACH_TIME = {"inputs.json", ".metadata", "config.yaml", "integrity.json", "parity.json"}


class Checkout:
    """Run commands of the package in one checkout."""

    def __init__(self, folder: Path, out: Path):
        self.folder, self.out = folder.resolve(), out.resolve()
        self.environment = {**os.environ, "PYTHONPATH": str(self.folder), "OMP_NUM_THREADS": "1"}

    def run(self, *arguments: str | Path, ranks: int = 1) -> str:
        """Run `ettin WORDS...` and return its output; exit with that output if it fails."""
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
        command = [sys.executable, "-W", "ignore", *launcher, "-m", "megatron_ettin", *map(str, arguments)]
        done = subprocess.run(command, cwd=self.out, env=self.environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"same_training: {' '.join(command)}: exit {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done.stdout

    def train(self, case: str, *more: str) -> None:
        ranks, objective, overrides = CASES[case]
        start = ["train", "--size", "17m", "--objective", objective, "--phase", "pretrain", "--run-dir", case]
        self.run(*start, *TINY.split(), *overrides.split(), "data.mixture=dataset", *more, ranks=ranks)


def text_of(out: Path) -> Path:
    """Write the text that all cases train on; it depends on this file only."""
    path = out / "text.jsonl"
    vocabulary = VOCABULARY.split()
    with path.open("w") as lines:
        for number in range(400):
            drawn = hashlib.sha256(str(number).encode()).digest() * (1 + number % 5)
            lines.write(json.dumps({"text": " ".join(vocabulary[byte % len(vocabulary)] for byte in drawn)}) + "\n")
    return path


def run(checkout: Path, out: Path, before: Path | None, cases: list[str]) -> None:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    package = Checkout(checkout, out)
    text = text_of(out)
    trained = [sys.executable, checkout.resolve() / "examples" / "train_tokenizer.py", text, "--out", "tokenizer"]
    subprocess.run([*map(str, trained), "--vocab", "320"], cwd=out, env=package.environment, check=True)
    package.run("prepare", text, "--out", "dataset", "--tokenizer", "tokenizer", "--chunk-tokens", "64")
    for case in cases:
        package.train(case, f"run.steps={STEPS}")
        package.run("convert", "to-hf", case, f"{case}-hf")
        (out / f"{case}.order").write_text(package.run("order", case, "--steps", f"1:{STEPS + 1}"))
        print(f"{case}: trained", flush=True)
    if before:
        for case, other in zip(cases, [*cases[1:], cases[0]], strict=True):
            resume(package, before, case, other)


def resume(package: Checkout, before: Path, case: str, other: str) -> None:
    """Resume from the other checkout's checkpoint, with its own layout and with the layout of another case."""
    layout_of_other = [word for word in CASES[other][2].split() if word.startswith("parallel.")]
    own = [word for word in CASES[case][2].split() if word.startswith("parallel.")]
    for name, ranks, layout in ((case, CASES[case][0], own), (f"{case}-as-{other}", CASES[other][0], layout_of_other)):
        if name != case and ("muon" in case or "zero" in case + other):
            continue
        folder = package.out / "resumed" / name
        shutil.copytree(before / case, folder)
        shutil.rmtree(folder / "checkpoints" / "latest", ignore_errors=True)
        overrides = [word for word in CASES[case][2].split() if not word.startswith("parallel.")]
        start = ["train", "--size", "17m", "--objective", CASES[case][1], "--phase", "pretrain", "--run-dir", folder]
        more = [
            *TINY.split(),
            *overrides,
            *layout,
            f"data.mixture={package.out / 'dataset'}",
            f"run.steps={STEPS + 2}",
        ]
        package.run(*start, *more, ranks=ranks)
        losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        print(f"{name}: went on to {len(losses)} steps, last loss {losses[-1]:.6f}", flush=True)


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in OTHER_EACH_TIME)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def differences(before: Path, after: Path) -> Iterator[str]:
    for name in ("dataset", *(f"{case}-hf" for case in CASES)):
        old, new = digests(before / name), digests(after / name)
        yield from (f"{name}/{key}" for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key))
    for case in CASES:
        if not (before / f"{case}.order").exists() or not (after / f"{case}.order").exists():
            yield f"{case}: missing"
            continue
        if (before / f"{case}.order").read_text() != (after / f"{case}.order").read_text():
            yield f"{case}: order table"
        lines = [(folder / case / "metrics.jsonl").read_text().splitlines() for folder in (before, after)]
        for number, (old, new) in enumerate(zip(*[map(json.loads, part) for part in lines], strict=True)):
            yield from (f"{case}: step {number}: {key}" for key in apart(old, new))
        old, new = (digests(folder / case / "checkpoints") for folder in (before, after))
        yield from (f"{case}: {key}" for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key))


def apart(old: dict, new: dict) -> list[str]:
    keys = [key for key in old.keys() | new.keys() if not any(part in key for part in OF_THE_MACHINE)]
    return sorted(key for key in keys if repr(old.get(key)) != repr(new.get(key)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    running.add_argument("--checkout", type=Path, default=Path("."))
    running.add_argument("--out", type=Path, required=True)
    running.add_argument("--resume-from", type=Path)
    running.add_argument("--case", action="append", choices=CASES)
    comparing = commands.add_parser("compare")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    args = parser.parse_args()
    if args.command == "run":
        before = args.resume_from.resolve() if args.resume_from else None
        run(args.checkout, args.out.resolve(), before, args.case or list(CASES))
        return
    differing = list(differences(args.before, args.after))
    print("\n".join(differing) or f"{len(CASES)} cases: the same losses, weights, exports and orders, bit for bit")
    sys.exit(bool(differing))


if __name__ == "__main__":
    main()
