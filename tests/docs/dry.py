"""Check the calls in tagged blocks without starting anything: a wrong option, key or target fails."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from tests.docs.pages import ROOT


def check(arguments: list[str]) -> int | None:
    """Parse a call with its command's own parser, and run it with --dry-run if the command has that option."""
    name, rest = arguments[0], arguments[1:]
    if name == "ettin":
        return ettin(rest)
    if name == "torchrun":
        ranks, inner = torchrun(rest)
        return ettin(inner, ranks)
    if name == "srun":
        return ettin(rest[rest.index("ettin") + 1 :])
    if name == "python":
        return python(rest)
    if name == "pip":
        return pip(rest)
    if name == "docker":
        return docker(rest)
    print(f"{name}: not looked into")
    return 0


def torchrun(arguments: list[str]) -> tuple[int, list[str]]:
    """Return the number of ranks that a torchrun call starts, and the arguments of its `ettin` call."""
    from torch.distributed.run import get_args_parser

    args = get_args_parser().parse_args(arguments)
    if not args.no_python or args.training_script != "ettin":
        sys.exit(f"torchrun: --no-python ettin is missing in {' '.join(arguments)}")
    return int(args.nproc_per_node) * int(args.nnodes.rpartition(":")[2]), args.training_script_args


def ettin(arguments: list[str], ranks: int | None = None) -> int | None:
    from megatron_ettin.cli.launch import parse_command, split_into_jobs
    from megatron_ettin.cli.main import main
    from megatron_ettin.cli.parsing import parse_arguments
    from megatron_ettin.config.overrides import check_keys, from_overrides
    from tests.cli.test_examples import parser_of

    name, *rest = arguments
    if name == "launch":
        separator = rest.index("--")
        options = [word for word in rest[:separator] if word != "--submit"]
        sys.argv = ["ettin", *arguments]
        return main(["launch", *options, "--dry-run", *rest[separator:]])
    args = parse_arguments(parser_of(name), name, rest)
    check_keys(from_overrides([*getattr(args, "overrides", [])]))
    if name in ("train", "bench") and "--compare" not in rest:
        if ranks is not None:  # this checks that the layout fits the number of ranks
            split_into_jobs(parse_command(name, rest, []), ranks, None)
        elif name == "bench":
            parse_command(name, rest, [])
    return main([*arguments, "--dry-run"]) if name == "train" and "--dry-run" not in rest else 0


def python(arguments: list[str]) -> int:
    """Check that every option occurs in the script's source."""
    if arguments[:2] == ["-m", "pytest"]:
        return 0
    path = ROOT / arguments[0]
    text = path.read_text()
    unknown = [word for word in arguments[1:] if word.startswith("--") and f'"{word.partition("=")[0]}"' not in text]
    if unknown:
        sys.exit(f"{arguments[0]} has no {unknown[0]}")
    return 0


def pip(arguments: list[str]) -> int:
    """Check that every extra of this package exists."""
    extras = {line for line in (ROOT / "setup.cfg").read_text().split("[options.extras_require]")[1].splitlines()}
    for word in arguments:
        match = re.fullmatch(r"(?:megatron[-_]ettin|\.)\[([\w,]+)\]", word)
        for extra in match[1].split(",") if match else ():
            if f"{extra} =" not in extras:
                sys.exit(f"pip: there is no extra {extra!r}")
    return 0


def docker(arguments: list[str]) -> int:
    stages = re.findall(r"^FROM .* AS (\w+)", Path(ROOT / "Dockerfile").read_text(), re.M | re.I)
    target = arguments[arguments.index("--target") + 1] if "--target" in arguments else stages[0]
    return 0 if target in stages else sys.exit(f"docker: no target {target!r}")
