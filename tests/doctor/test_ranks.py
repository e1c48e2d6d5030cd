"""Comparison of ranks: their rates, sums and clocks, and real ranks that differ."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_ettin.cli.main import main
from megatron_ettin.doctor import host, ranks
from megatron_ettin.doctor.findings import format_flops, ok, problem
from megatron_ettin.doctor.ranks import AllReduces, Products, products, wrong_rows
from megatron_ettin.platform.device import Platform


def test_rates_slow_or_wrong_products_name_the_rank() -> None:
    good = Products(700e12, 690e12, "bfloat16", 8192, None)
    assert ranks.judge_products("p", "NVIDIA H100", 989e12, good).state == "ok"
    assert ranks.judge_products("p", "NVIDIA H100", 989e12, Products(300e12, 290e12, "b", 8, None)).state == "warning"
    assert ranks.judge_products("p", "NVIDIA H100", 989e12, Products(700e12, 300e12, "b", 8, None)).state == "warning"
    assert (
        ranks.judge_products("p", "NVIDIA H100", 989e12, Products(7e14, 7e14, "b", 8, "other bits")).state == "problem"
    )
    ranks_of = [ok("products", "", tflops=rate) for rate in (700.0, 710.0, 705.0, 500.0)]
    slow = ranks.judge_rates(["a", "a", "b", "b"], ranks_of)
    assert slow.state == "warning"
    assert "rank 3 on b: 71%" in slow.text
    wrong = ranks.judge_rates(["a", "b"], [ranks_of[0], problem("products", "computes wrongly", "replace it")])
    assert wrong.state == "problem"
    assert "rank 1 on b" in wrong.text
    assert (format_flops(51.2e9), format_flops(612e12)) == ("51 GFLOP/s", "612 TFLOP/s")


def test_wrong_rows_detects_wrong_matrix_products() -> None:
    done = products(Platform(torch.device("cpu"), "gloo", "cpu"), 0.0, side=64)
    assert done.error is None
    assert done.flops > 0
    a, b = torch.randn(64, 64), torch.randn(64, 64)
    assert wrong_rows(a, b, a @ b) is None
    assert "is off by" in (wrong_rows(a, b, a @ b + 10) or "")
    assert wrong_rows(a, b, torch.full((64, 64), float("nan"))) is not None


def test_all_reduce_and_clocks_wrong_sums_or_skew_are_reported() -> None:
    from megatron_ettin.platform.device import Platform

    platform = Platform(torch.device("cpu"), "gloo", "cpu")
    assert ranks.all_reduce_finding(AllReduces(0.0, 1, 2, "3 of 4 sums are wrong"), platform).state == "problem"
    assert "1.5 GB/s" in ranks.all_reduce_finding(AllReduces(1.5e9, 4 << 20, 2, None), platform).text
    assert ranks.judge_clocks(["a", "b", "c"], [100.0, 100.002, 100.001]).text.startswith("within 2 ms")
    late = ranks.judge_clocks(["a", "b", "c"], [100.0, 100.0, 160.0])
    assert late.state == "warning"
    assert "the clock of c is 60 s ahead" in late.text


def test_doctor_ranks_agree_or_name_the_differing_rank(pool, tmp_path: Path) -> None:
    arguments = ["doctor", "--ranks", "--path", str(tmp_path)]
    first, second = pool.run(2, arguments)
    assert (first.status, second.status, second.output) == (0, 0, ""), first.output + second.output
    for expected in (
        "rendezvous: 2 ranks",
        "ranks alike: the same",
        "clocks: within",
        "right",
        "2 ranks, 4 MiB; right",
    ):
        assert expected in first.output
    first, second = pool.run(2, [*arguments, "--quick"], mutation="doctor_of_other_code_on_rank_1")
    assert (first.status, second.status) == (1, 1)
    assert "problem  ranks alike: the ranks differ in code of megatron_ettin: rank 1" in first.output


def test_doctor_ranks_with_unknown_first_host_do_not_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Report the problem on each rank by itself, without a rendezvous."""
    monkeypatch.setattr(host, "_names", lambda: [problem("first host", "n1 does not resolve", "mend it")])
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert main(["doctor", "--ranks", "--quick", "--path", str(tmp_path)]) == 1
    first, _ = capsys.readouterr().out.splitlines()
    assert first == "problem  first host: n1 does not resolve -> mend it"
