"""Parsed arguments as words again."""

from __future__ import annotations

from megatron_ettin.cli.parsing import OneLineParser, format_arguments


def test_words_of_parsed_arguments_round_trip() -> None:
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
