"""Every example of every command's --help works as printed: each is parsed by the command's own parser, and the cheap ones
run on tiny files with the names that they use. A new example must be listed in `RUN` or `READ_ONLY`."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

from megatron_ettin.cli.main import COMMANDS, main
from megatron_ettin.cli.parsing import OneLineParser, parse_arguments
from tests.conftest import sentences
from tests.pool import Pool
from tests.train.runs import command

ROOT = Path(__file__).resolve().parents[2]
STARTERS = ("torchrun", "srun")
SHELL = re.compile(r"\s+(?:\||>|#).*")  # everything in a line that only the shell reads: pipes, redirections, comments
# commands that import torch run in a worker of the pool, which has imported it
POOL = ("train", "convert", "eval", "order", "inspect", "compare")

# example -> options to add; the value of an option that the example already has is replaced
RUN: dict[str, dict[str, str | None]] = {
    "prepare wiki.jsonl.zst books/": {"--workers": "1", "--tokenizer": "TOKENIZER", "--out": "data/new"},
    "inspect data/corpus": {},
    "inspect runs/17m-mlm/checkpoints": {},
    "train --size 17m": {"--dry-run": None},
    "train --size 1b": {"--dry-run": None},
    "plan --size 1b --gpus 512": {},
    "plan --size 1b --gpus 64": {},
    "launch --nodes 8": {"--dry-run": None},
    "launch --suite": {"--dry-run": None},
    "status runs/1b-mlm": {},
    "eval runs/17m-mlm": {},
    "compare runs/enc-pretrain": {},
    "report runs/17m-mlm": {},
    "doctor --path data runs": {"--quick": None},
    "order runs/17m-mlm --steps 1:11": {},
    "order runs/17m-mlm --steps 1:3": {},
    "order runs/17m-mlm --fingerprint": {},
    "convert to-hf runs/17m-mlm exported --dtype": {},
    "convert from-hf exported imported": {},
    "completion": {},
}
READ_ONLY = {
    "prepare s3://": "wants a bucket and a cluster",
    "bench": "measures for minutes (tests/bench)",
    "plan --size 1b --gpu h100 --scale": "seconds (tests/plan)",
    "status": "asks SLURM, or goes on for ever (tests/launch)",
    "compare enc/pretrain": "four runs (tests/report)",
    "report runs/17m-mlm runs": "a pair (tests/report)",
    "report runs/17m-mlm --watch": "goes on for ever (tests/report)",
    "convert to-hf runs/17m-mlm exported": "the same as in `ettin convert --help`",
    "convert from-composer": "wants a file of the original trainer (tests/convert/composer)",
    "release": "ten seconds, or a hub (tests/release)",
    "doctor": "measures, or wants ranks or GPUs (tests/doctor)",
}


def parser_of(name: str) -> OneLineParser:
    module = importlib.import_module(f"megatron_ettin.cli.{COMMANDS[name][0]}")
    raw = argparse.RawDescriptionHelpFormatter
    parser = OneLineParser(prog=f"ettin {name}", description=module.__doc__, formatter_class=raw)
    module.add_arguments(parser)
    return parser


def helps(parser: argparse.ArgumentParser) -> list[str]:
    """Return the help texts of a command and of its subcommands."""
    actual = [parser.format_help()]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            actual += [text for inner in action.choices.values() for text in helps(inner)]
    return actual


def examples(text: str) -> list[str]:
    """Return the words after `ettin` of each indented line that calls it; continued lines are joined."""
    joined = re.sub(r"\\\n\s*", "", text)
    actual = []
    for line in joined.splitlines():
        starters = "|".join(STARTERS)
        match = re.match(rf"\s+(?:(?:{starters}) .*?)?\bettin (?=[a-z])(.*)", line)
        if match:
            actual.append(SHELL.sub("", match[1]).strip())
    return actual


EXAMPLES = list(
    dict.fromkeys((name, example) for name in COMMANDS for text in helps(parser_of(name)) for example in examples(text))
)


def longest(example: str, table: dict) -> str:
    """Return the longest entry of the table that an example begins with."""
    return max((entry for entry in table if example.startswith(entry)), key=len, default="")


def runs(example: str) -> bool:
    return len(longest(example, RUN)) > len(longest(example, READ_ONLY))


def test_help_examples_cover_every_command_and_table_entry() -> None:
    assert {name for name, _ in EXAMPLES} == set(COMMANDS)
    assert not [example for _, example in EXAMPLES if not longest(example, {**RUN, **READ_ONLY})]
    used = {longest(example, RUN if runs(example) else READ_ONLY) for _, example in EXAMPLES}
    assert used == {*RUN, *READ_ONLY}
    assert not [example for _, example in EXAMPLES if "..." in example]


@pytest.mark.parametrize(("name", "example"), EXAMPLES, ids=[example for _, example in EXAMPLES])
def test_help_example_is_accepted_by_parser(name: str, example: str) -> None:
    command_name, *arguments = shlex.split(example)
    assert command_name == name
    args = parse_arguments(parser_of(name), name, arguments)
    if name == "launch":
        inner, *arguments = args.command[1:]
        args = parse_arguments(parser_of(inner), inner, arguments)
    for override in getattr(args, "overrides", []):
        from megatron_ettin.config.overrides import check_keys, from_overrides

        check_keys(from_overrides([override]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, pool: Pool, corpus: Path, tiny_tokenizer: Path) -> Path:
    """Make a folder with the files, datasets and runs that the examples name."""
    import zstandard

    folder = tmp_path_factory.mktemp("examples")
    (folder / "data").mkdir()
    (folder / "data" / "corpus").symlink_to(corpus)
    (folder / "books").mkdir()
    (folder / "books" / "one.txt").write_text(sentences(1, 40))
    lines = "".join(json.dumps({"text": sentences(seed, 20), "id": f"d{seed}"}) + "\n" for seed in range(20))
    (folder / "wiki.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    (folder / "site.yaml").write_text((ROOT / "examples" / "slurm" / "sites" / "generic.yaml").read_text())
    measured = {"size": "150m", "gpus": 8, "gpu": "h100", "tokens_per_second_per_gpu": 100_000}
    (folder / "runs.jsonl").write_text(
        json.dumps(measured) + "\n" + json.dumps({**measured, "size": "1b", "tokens_per_second_per_gpu": 20_000})
    )
    for name, objective in (("17m-mlm", "mlm"), ("dec-pretrain", "clm")):
        line = command(folder / "runs" / name, corpus, objective, ["run.steps=2", "checkpoint.every_steps=1"])
        (done,) = pool.run(1, line)
        assert done.status == 0, done.output[-3000:]
    run = folder / "runs" / "17m-mlm"
    for link, target in (("enc-pretrain", run), ("1b-mlm", run), ("17m-mlm/decay", folder / "runs" / "dec-pretrain")):
        (folder / "runs" / link).symlink_to(target)
    (run / "checkpoints" / "step_000000100").symlink_to(run / "checkpoints" / "step_000000002")
    return folder


def words_of(example: str, tokenizer: Path) -> list[str]:
    """Return an example's arguments with the options that `RUN` adds and without --submit."""
    arguments = [word for word in shlex.split(example) if word != "--submit"]
    for option, value in RUN[longest(example, RUN)].items():
        value = str(tokenizer) if value == "TOKENIZER" else value
        if option in arguments and value is not None:
            arguments[arguments.index(option) + 1] = value
        else:
            arguments[1:1] = [option] if value is None else [option, value]
    # `launch` compares the model's vocabulary with that of the tests' corpus
    return [*arguments, "model.vocab_size=320"] if arguments[0] == "launch" else arguments


@pytest.mark.parametrize("name", [name for name in COMMANDS if any(runs(e) for n, e in EXAMPLES if n == name)])
def test_help_examples_of_command_exit_0(
    name: str,
    folder: Path,
    pool: Pool,
    tiny_tokenizer: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Run the examples in order, because one may use the output of another."""
    monkeypatch.chdir(folder)
    for example in [example for of, example in EXAMPLES if of == name and runs(example)]:
        arguments = words_of(example, tiny_tokenizer)
        if name in POOL:
            (done,) = pool.run(1, arguments, cwd=folder)
            status, output = done.status, done.output
        else:
            status = main(arguments)
            output = "".join(capsys.readouterr())
        assert status == 0, f"{example}: {output[-2000:]}"
        assert output, example
