"""The planner's byte counts of a 512-rank layout against single ranks of it: real model, fake process groups."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_ettin.config.resolve import parse
from megatron_ettin.plan.memory import rank_memory, rank_parameters
from megatron_ettin.plan.step_time import data_bytes, tied_gradient_bytes
from tests import forkserver
from tests.plan.volumes import volumes

COMMON = ["runtime.device=cpu", "model.num_layers=8", "batch.micro_batch_rows=1", "batch.warmup_tokens=0"]
SP = ["parallel.tp=2", "parallel.sequence_parallel=true"]
INTERLEAVED = ["parallel.pp=4", "parallel.vpp=2", "parallel.overlap=true", "batch.global_batch_rows=512"]
WORLD = 512


@pytest.fixture(scope="module")
def server() -> Path:
    """Return the socket of the session's fork server once it answers, so that no test waits for its imports."""
    path = forkserver.shared()
    forkserver.connect(path).close()
    return path


@pytest.mark.parametrize(
    ("rank", "dp", "overrides"),
    [
        pytest.param(0, 64, [*SP, "parallel.pp=4", "batch.global_batch_rows=256"], marks=pytest.mark.full),
        pytest.param(511, 64, [*SP, "parallel.pp=4", "batch.global_batch_rows=256"], marks=pytest.mark.full),
        (200, 64, ["parallel.tp=2", *INTERLEAVED, "precision.gradients=bf16"]),
        (3, 128, ["parallel.cp=2", "parallel.tp=2", "batch.global_batch_rows=256", "precision.name=fp32"]),
        pytest.param(
            *(9, 512, ["parallel.distributed_optimizer=false", "batch.global_batch_rows=1024"]), marks=pytest.mark.full
        ),
    ],
)
def test_rank_of_512_matches_predicted_memory_and_traffic(
    server: Path, tmp_path: Path, rank: int, dp: int, overrides: list[str]
) -> None:
    with open(tmp_path / "shown", "wb") as shown, open(tmp_path / "errors", "wb") as errors:
        files = (0, shown.fileno(), errors.fileno())
        arguments = [WORLD, rank, "17m", [*COMMON, *overrides]]
        child = forkserver.call(server, "tests.plan.fake_rank:main", arguments, files)
    status = child.wait(300)
    child.close()
    assert status == 0, (tmp_path / "errors").read_text()[-2000:]
    measured = json.loads((tmp_path / "shown").read_text().splitlines()[-1])
    config = parse("17m", "mlm", "pretrain", overrides=[*COMMON, *overrides])
    pp_rank = rank // (WORLD // config.parallel.pp)
    parameters, _ = rank_parameters(config, pp_rank)
    assert measured["parameters"] == parameters
    memory = rank_memory(config, dp, pp_rank, on_gpu=False)
    kept = memory.weights_bytes + memory.gradients_bytes + memory.optimizer_bytes
    # the difference: padding of buffers, states of generators
    assert measured["held"] == pytest.approx(kept, rel=0.001, abs=20_000)
    sent, expected = measured["sent"], volumes(config, dp, pp_rank)

    def passed(axis: str, *methods: str) -> int:
        return sum(count for method, count in sent.get(axis, {}).items() if method.startswith(methods))

    if config.parallel.sequence_parallel:  # all-reduces are left out: sums over labels, gradients of norms
        assert passed("tp", "all_gather", "reduce_scatter", "_") == expected["tp"]
    elif config.parallel.tp > 1:
        assert passed("tp", "allreduce") == pytest.approx(expected["tp"], rel=0.06)
        assert sent["tp"].keys() == {"allreduce"}
    assert passed("cp", "all") == expected["cp"]
    if config.parallel.pp > 1:
        tied = tied_gradient_bytes(config) if pp_rank in (0, config.parallel.pp - 1) else 0
        assert passed("pp", "send") == expected["pp"] - tied
        assert passed("pp", "allreduce") == tied
    reduced, gathered = data_bytes(config, pp_rank)
    padding = 1024 * dp  # a bucket's share of every rank is aligned
    assert 0 <= passed("dp", "reduce_scatter", "allreduce") - reduced <= padding
    assert 0 <= passed("dp", "all_gather") - gathered <= padding
