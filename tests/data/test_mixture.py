"""Mixtures: their files, the proportions they guarantee, the epochs of each source, and refused mixtures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from megatron_ettin.cli.main import main
from megatron_ettin.data.blended_dataset import open_blended_dataset
from megatron_ettin.data.dataset import Dataset
from megatron_ettin.data.mixture import (
    BLOCK_SLOTS,
    MixtureEntry,
    SourceEpochs,
    epoch_warnings,
    largest_remainder,
    parse_mixture,
    planned_epochs,
)
from megatron_ettin.data.sampler import ShuffledSampler

EXAMPLES = Path(__file__).parents[2] / "examples" / "mixtures"
TRAIN = ["train", "--size", "17m", "--objective", "mlm", "--phase", "pretrain"]
SHARES = st.lists(st.floats(1e-3, 1.0), min_size=1, max_size=12)


def test_parse_mixture_relative_paths_resolve_from_file_or_root(tmp_path: Path) -> None:
    listed = "[{path: web, weight: 3}, {path: /abs/code, weight: 1e-1}]"
    (tmp_path / "list.yaml").write_text(listed)
    (tmp_path / "keyed.yml").write_text(f"datasets: {listed}")
    expected = [MixtureEntry(str(tmp_path / "web"), 3.0), MixtureEntry("/abs/code", 0.1)]
    assert parse_mixture(str(tmp_path / "list.yaml")) == parse_mixture(str(tmp_path / "keyed.yml")) == expected
    rooted = parse_mixture(str(tmp_path / "list.yaml"), root="/data")
    assert [entry.path for entry in rooted] == ["/data/web", "/abs/code"]
    assert parse_mixture(["a", "../b"], root="x/y") == [MixtureEntry("x/y/a"), MixtureEntry("x/b")]


@pytest.mark.parametrize(("name", "billions", "sources"), [("pretrain", 1704.7, 13), ("extend", 249.3, 10), ("decay", 76.3, 9)])  # fmt: skip
def test_example_mixtures_sum_to_published_token_counts(name: str, billions: float, sources: int) -> None:
    entries = parse_mixture(str(EXAMPLES / f"{name}.yaml"))
    assert len(entries) == sources
    assert len({entry.path for entry in entries}) == sources
    assert sum(entry.tokens or 0 for entry in entries) == pytest.approx(billions * 1e9, abs=1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "empty"),
        ("datasets: []", "empty"),
        ("datasets: 3", "a list of datasets was expected, found 3"),
        ("data: [a]", "no key 'data'"),
        ("- {path: a, weigth: 1}", "m.yaml[0]: no key 'weigth' (did you mean 'weight'?)"),
        ("- {path: a, weight: .nan}", "m.yaml[0].weight: nan"),
        ("- {path: a, weight: -2}", "m.yaml[0].weight: -2"),
        ("- {path: a, weight: 0}", "m.yaml[0].weight: 0"),
        ("- {path: a, weight: .inf}", "m.yaml[0].weight: inf"),
        ("- {path: a, tokens: 0}", "m.yaml[0].tokens: 0"),
        ("- [", "m.yaml:1: not valid YAML"),
        (None, "No such file"),
    ],
)
def test_train_invalid_mixture_file_is_refused_in_one_line(
    content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "m.yaml"
    if content is not None:
        path.write_text(content)
    assert main([*TRAIN, "--dry-run", f"data.mixture={path}"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert message in lines[0], lines


def test_train_invalid_mixture_file_leaves_no_run_behind(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "m.yaml").write_text("data: [a]")
    assert main([*TRAIN, "--run-dir", str(tmp_path / "run"), f"data.mixture={tmp_path / 'm.yaml'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no key 'data'" in line
    assert not (tmp_path / "run").exists()


def test_train_empty_mixture_is_refused(capsys: pytest.CaptureFixture) -> None:
    assert main([*TRAIN, "--dry-run", "data.mixture=[]"]) == 2
    assert "data.mixture: empty" in capsys.readouterr().err


@given(SHARES, st.integers(0, 5 * BLOCK_SLOTS), st.integers(1, 4 * BLOCK_SLOTS), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_shuffled_sampler_any_window_holds_proportions_within_bound(
    shares: list[float], begin: int, length: int, seed: int
) -> None:
    """Any window is within the bound that data/sampler.py's docstring gives; aligned blocks have the exact counts."""
    exact = np.asarray(shares) / sum(shares)
    counts = np.asarray(largest_remainder(exact.tolist(), BLOCK_SLOTS))
    assert (np.abs(counts - exact * BLOCK_SLOTS) < 1).all()
    order = ShuffledSampler(counts.tolist(), [10_007] * len(shares), seed, "pretrain")
    sources, _, _ = order.locate(np.arange(begin, begin + length))
    present = np.bincount(sources, minlength=len(shares))
    bound = length / BLOCK_SLOTS + 2 * counts * (1 - counts / BLOCK_SLOTS)
    assert (np.abs(present - exact * length) <= bound + 1e-6).all()
    block = begin // BLOCK_SLOTS
    sources, _, _ = order.locate(np.arange(block * BLOCK_SLOTS, (block + 1) * BLOCK_SLOTS))
    assert np.bincount(sources, minlength=len(shares)).tolist() == counts.tolist()


def test_epochs_of_mixture_match_counts_in_the_order(prepared: Dataset, other: Dataset) -> None:
    """A source's epochs are its rows in the order divided by its rows; the estimate from manifests alone is close."""
    mixture = [MixtureEntry(str(prepared.path), 1.0), MixtureEntry(str(other.path), 1.0)]
    corpus = open_blended_dataset(mixture, 256, "packed", 21, "pretrain")
    rows = 2 * BLOCK_SLOTS
    table = corpus.epochs(round(rows * corpus.mean_tokens_per_row))
    sources, _, epochs = corpus.locate(np.arange(rows))
    for i, source in enumerate(table):
        assert source.epochs == pytest.approx(np.sum(sources == i) / corpus.packing_indices[i].num_rows, rel=1e-6)
        assert epochs[sources == i].max() == np.ceil(source.epochs) - 1
    assert [source.share for source in table] == pytest.approx([0.5, 0.5], abs=1e-4)
    planned = planned_epochs(mixture, round(rows * corpus.mean_tokens_per_row))
    assert [s.epochs for s in planned] == pytest.approx([s.epochs for s in table], rel=1e-3)


def test_epoch_warnings_grow_with_repetition() -> None:
    table = [SourceEpochs(name, 0.3, 100, epochs) for name, epochs in (("a", 1.0), ("b", 2.5), ("c", 9.0))]
    quiet, loud = epoch_warnings(table)
    assert quiet == "note: data.mixture: b will be read 2.5 times"
    assert loud.startswith("warning: data.mixture: c will be read 9.0 times; beyond 4 epochs")


def test_dry_run_shows_mixture_shares_and_epoch_notes(prepared: Dataset, other: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:  # fmt: skip
    mixture = tmp_path / "mixture.yaml"
    mixture.write_text(f"[{{path: {prepared.path}, weight: 3}}, {{path: {other.path}, weight: 1}}]")
    arguments = [*TRAIN, "--dry-run", f"data.mixture={mixture}", f"run.tokens={2 * prepared.num_tokens}"]
    arguments += ["schedule.warmup_tokens=0"]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert str(other.path) in printed.out
    assert "75.00%" in printed.out
    assert f"note: data.mixture: {prepared.path} will be read 1.5 times" in printed.err
    assert main([*arguments, "--json"]) == 0
    shares = [source["share"] for source in json.loads(capsys.readouterr().out)["mixture"]]
    assert shares == [0.75, 0.25]
    assert main([*TRAIN, "--dry-run", "data.mixture=/nowhere"]) == 0  # a dry run does not need the data
    assert "/nowhere: no such directory" in capsys.readouterr().out
