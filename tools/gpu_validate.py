"""Check the package's promises about GPUs on this GPU. Prints which passed, which failed, and which cannot run and why.

  python tools/gpu_validate.py --data DATASET [--only SECTION,...] [--results gpu.json] [--out TABLE.md]

  rates        copies, products, FP8 linears and element-wise work at the shapes of a layer, and the linears' errors
  attention    every kernel that runs: outputs and gradients against float64, seconds
  layers       Transformer Engine's layers against core's: losses of twenty steps
  precisions   200 steps of each precision against bf16, on the same rows
  checkpoints  resumed FP8 runs, and runs that change precision or device
  export       runs of this device as verified folders of transformers
  throughput   tokens/s, MFU and memory of encoder and decoder, by length and precision
  peers        the same rows through transformers, compiled
  roofline     the least time of a step by the measured rates, part by part, against the measured step

DATASET is `ettin prepare`d with packing indices of all --seq-lens. Each section is a process of its own and ends within
--minutes. The same command continues with what is missing and keeps what passed. On a host without a GPU, `--device
cpu` runs what it can. Overrides after `--` go to every run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpu_checks.session import ABSENT, FAILED, PASSED, Results, Session

SECTIONS = ("rates", "attention", "layers", "precisions", "checkpoints", "export", "throughput", "peers", "roofline")


def run_section(name: str, session: Session) -> None:
    """Run a section in this process."""
    from megatron_ettin.platform import detect

    # without a GPU this emulates core's CUDA calls
    detect(session.device)
    from gpu_checks import attention, peers, rates, roofline, runs

    sections = {
        "rates": rates.section,
        "attention": attention.section,
        "peers": peers.section,
        "roofline": roofline.section,
    }
    sections |= {one: getattr(runs, one) for one in ("layers", "precisions", "checkpoints", "export")}
    if name == "throughput":
        for size in session.sizes:
            runs.throughput(session, size)
    else:
        sections[name](session)


def table(results: dict[str, dict[str, Any]], command: str) -> str:
    """Return a Markdown table of every item, and the number of items in each state."""
    states = [result["state"] for items in results.values() for result in items.values()]
    counts = ", ".join(f"{states.count(state)} {state}" for state in (PASSED, FAILED, ABSENT))
    lines = ["# What this device did", "", f"`{command}`", "", f"{time.strftime('%Y-%m-%d')}; {counts}.", ""]
    lines += ["| section | item | state | figures |", "|---|---|---|---|"]
    lines += [
        f"| {section} | {item} | {result['state']} | {result['says'].replace('|', '/')} |"
        for section, items in results.items()
        for item, result in items.items()
    ]
    return "\n".join(lines) + "\n"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, with commas between")
    parser.add_argument("--device", default="gpu", choices=("gpu", "cpu"))
    parser.add_argument("--sizes", default="17m,150m", help="of curves and checkpoints (the first), and of kernels")
    parser.add_argument("--speed-sizes", default="1b,150m", help="of rates, attention, throughput, peers and roofline")
    parser.add_argument("--seq-lens", default="1024,8192")
    parser.add_argument("--steps", type=int, default=200, help="of the curves")
    parser.add_argument("--tokens", type=int, default=16_384, help="of a micro-batch")
    parser.add_argument("--rounds", type=int, default=20, help="of what is timed")
    parser.add_argument("--minutes", type=float, default=8.0, help="of each section; no item begins later")
    parser.add_argument("--results", type=Path, default=Path("gpu.json"))
    parser.add_argument("--work", type=Path, default=Path("gpu-work"), help="where runs are written")
    parser.add_argument("--out", type=Path, help="the table as Markdown")
    parser.add_argument("--child", choices=SECTIONS, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="key=value of every run")
    arguments = parser.parse_args()
    arguments.sections = arguments.only.split(",")
    if wrong := [name for name in arguments.sections if name not in SECTIONS]:
        parser.error(f"--only: {wrong[0]!r} is no section; they are {', '.join(SECTIONS)}")
    if not (arguments.data / "manifest.json").is_file():
        parser.error(f"--data {arguments.data}: no dataset of `ettin prepare` (no manifest.json)")
    return arguments


def session_of(arguments: argparse.Namespace) -> Session:
    sizes = (
        arguments.sizes
        if arguments.child in ("layers", "precisions", "checkpoints", "export")
        else arguments.speed_sizes
    )
    arguments.work.mkdir(parents=True, exist_ok=True)
    return Session(
        arguments.device, arguments.data, arguments.work, Results(arguments.results), sizes.split(","),
        [int(length) for length in arguments.seq_lens.split(",")], arguments.steps, arguments.tokens, arguments.rounds,
        time.monotonic() + 60 * arguments.minutes, arguments.overrides,
    )  # fmt: skip


def main() -> int:
    arguments = parse_arguments()
    if arguments.child:
        run_section(arguments.child, session_of(arguments))
        return 0
    command = " ".join(["python tools/gpu_validate.py", *sys.argv[1:]])
    for name in arguments.sections:
        print(f"== {name}", flush=True)
        done = subprocess.run([sys.executable, __file__, "--child", name, *sys.argv[1:]])
        results = Results(arguments.results)
        results.forget(name, "the section")
        # if a kernel kills its process, earlier results are kept
        if done.returncode:
            results.put(name, "the section", {"state": FAILED, "says": f"its process ended with {done.returncode}"})
    results_by_section = Results(arguments.results).items
    text = table(results_by_section, command)
    print(text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")
    return int(any(result["state"] == FAILED for items in results_by_section.values() for result in items.values()))


if __name__ == "__main__":
    sys.exit(main())
