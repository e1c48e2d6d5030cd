"""Bounds of numeric options, and turning parsed arguments back into a command line."""

from __future__ import annotations

import pytest

from megatron_ettin.cli.main import main
from megatron_ettin.cli.parsing import OneLineParser, format_arguments


def test_format_arguments_round_trips_parsed_arguments() -> None:
    from megatron_ettin.cli import train

    parser = OneLineParser()
    train.add_arguments(parser)
    arguments = [
        "--init-from",
        "a b",
        "--allow-change",
        "optim.lr",
        "--allow-change",
        "run.seed",
        "optim.lr=1",
        "x.y=2",
    ]
    args = parser.parse_intermixed_args(arguments)
    assert format_arguments(parser, args, ()) == arguments
    assert format_arguments(parser, args, ("init_from", "allow_change")) == ["optim.lr=1", "x.y=2"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("doctor --gpus -1", "--gpus -1: must be at least 0"),
        ("eval run --data corpus --rows 0", "--rows 0: must be at least 1"),
        ("inspect corpus --sample=-1", "--sample -1: must be at least 0"),
        ("launch --nodes 1 --restarts -1 -- train", "--restarts -1: must be at least 0"),
        ("launch --nodes 1 --at-once 0 -- train", "--at-once 0: must be at least 1"),
        ("plan --size 17m optim.lr=1 --gpus 0 batch.micro_batch_rows=1", "--gpus 0: must be above 0"),
        ("status --watch --every 0", "--every 0: must be above 0"),
        ("status --watch --every nan", "--every nan: must be above 0"),
        ("status --watch --every inf", "--every inf: must be finite"),
    ],
)
def test_number_out_of_bounds_is_refused_in_one_line(
    line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = line.split()
    assert main(command) == 2
    assert capsys.readouterr().err == f"ettin {command[0]}: {message}\n"
