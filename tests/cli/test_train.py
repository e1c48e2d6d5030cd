"""Invalid input of `ettin train`: one line that names the key and what is allowed, exit status 2, nothing written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_ettin.cli.main import main
from megatron_ettin.config.resolve import from_yaml
from tests.conftest import make_corpus, make_tokenizer
from tests.pool import Pool
from tests.train.runs import command, train


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must be refused and return its one line of error."""
    assert main(arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("ettin "), lines
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("optim.lrr=1", "did you mean 'optim.lr'?"),
        ("optim.lr=high", "optim.lr: 'high' is not a number"),
        (
            "parallel.tp=8 model.num_attention_heads=28 model.hidden_size=1792",
            "parallel.tp: 8 does not divide 28 heads",
        ),
        ("data.mixture=null", "data.mixture: not set"),
        ("data.mixture=/nowhere", "/nowhere"),
        ("data.seq_len=32", "do not fit rows of data.seq_len = 32"),
        ("model.vocab_size=50368", "model.vocab_size: 50368, but the dataset's tokenizer has 320"),
        ("runtime.device=gpu", "runtime.device=gpu: this host has no GPU that torch can use"),
        ("precision.name=fp8-current", "fp8-current needs a GPU, found none; the nearest that runs is bf16"),
        ("parallel.tp=2", "= 2 does not divide 1 rank"),
        (
            "parallel.tp=2 parallel.sequence_parallel=true parallel.tp_overlap=true",
            "parallel.tp_overlap: needs a GPU, found none; parallel.tp_overlap=false",
        ),
        (
            "runtime.deterministic=true parallel.tp=2 parallel.sequence_parallel=true parallel.tp_overlap=true",
            "runtime.deterministic: does not work with parallel.tp_overlap",
        ),
        (
            "runtime.cuda_graph=true",
            "runtime.cuda_graph: needs a GPU, found none; runtime.cuda_graph=false computes the same",
        ),
        ("parallel.offload_layers=1", "parallel.offload_layers: 1 needs a GPU, found none; parallel.recompute=full"),
        (
            "runtime.attention=te-fused",
            "runtime.attention: te-fused needs a GPU, found none; the nearest that runs is sdpa",
        ),
        ("runtime.attention=flash", "runtime.attention: flash needs the flash-attn package, which is not installed"),
        (
            "runtime.attention=varlen",
            "runtime.attention: varlen needs a GPU, found none; the nearest that runs is sdpa",
        ),
        ("runtime.attention=flex", "runtime.attention: flex needs a GPU, found none (it has no backward on a CPU)"),
        ("optim.name=lion", "'lion' does not exist; it is one of stable_adamw, adamw, muon"),
        ("optim.name=muon", "the distributed optimizer shards them; set parallel.distributed_optimizer=false"),
    ],
)
def test_train_invalid_setting_is_refused_without_writing(
    arguments: str, message: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(command(tmp_path / "run", corpus, "mlm", arguments.split()), capsys)
    assert message in line
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_train_unwritable_run_directory_is_refused(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    line = refused(command(tmp_path / "file" / "run", corpus, "mlm", ["run.steps=1"]), capsys)
    assert f"run directory {tmp_path / 'file' / 'run'}: cannot be written" in line


def test_train_masked_objective_without_mask_token_is_refused(
    tiny_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(tiny_tokenizer, tokenizer)
    for path in tokenizer.iterdir():
        path.write_text(path.read_text().replace('"mask_token"', '"none"').replace("[MASK]", "[SOMETHING]"))
    corpus = make_corpus(tmp_path, tokenizer)
    capsys.readouterr()
    for objective in ("mlm", "mntp", "hybrid"):
        line = refused(command(tmp_path / "run", corpus, objective, ["run.steps=1"]), capsys)
        assert f"objective {objective}: the dataset's tokenizer has no mask token; clm needs none" in line
        assert not (tmp_path / "run" / "checkpoints").exists()
        assert not (tmp_path / "run" / "config.yaml").exists()


def test_train_truncated_dataset_is_refused(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "dataset"
    shutil.copytree(corpus, broken)
    shard = broken / "shard_00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    line = refused(command(tmp_path / "run", broken, "mlm", ["run.steps=1"]), capsys)
    assert "shard_00000.bin" in line


def test_train_mixture_of_two_tokenizers_is_refused(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "dataset"
    shutil.copytree(corpus, other)
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["tokenizer"]["fingerprint"] = "0" * 64
    (other / "manifest.json").write_text(json.dumps(manifest))
    line = refused(command(tmp_path / "run", corpus, "mlm", [f"data.mixture=[{corpus}, {other}]"]), capsys)
    assert "tokenizer" in line or "manifest.json" in line


@pytest.mark.ranks
def test_resume_changed_science_key_is_refused_unless_allowed(
    pool: Pool, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train(pool, 1, run, corpus, "mlm", ["run.steps=2"])
    before = (run / "config.yaml").read_text()
    line = refused(command(run, corpus, "mlm", ["run.steps=4", "optim.lr=1e-4"]), capsys)
    assert "was started with optim.lr=0.003, now optim.lr=0.0001" in line
    assert "--allow-change optim.lr" in line
    assert "run.objective=mlm, now run.objective=clm" in refused(command(run, corpus, "clm", ["run.steps=4"]), capsys)
    assert "did you mean 'optim.lr'?" in refused(
        command(run, corpus, "mlm", ["run.steps=4"], ["--allow-change", "optim.lrr"]), capsys
    )
    line = refused(command(run, corpus / "heldout", "mlm", ["run.steps=4"]), capsys)
    assert "data.mixture" in line
    assert (run / "config.yaml").read_text() == before
    # keys that are not science keys may change; an allowed science key is recorded
    arguments = ["run.steps=3", "optim.lr=1e-4", "batch.micro_batch_rows=4"]
    (result,) = pool.run(1, command(run, corpus, "mlm", arguments, ["--allow-change", "optim.lr"]))
    assert result.status == 0, result.output[-2000:]
    history = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    assert history[-1]["changes"] == ["optim.lr"]
    assert history[-1]["step"] == 2
    # the run keeps its own reference rate of the weight decay
    assert "optim.lr 0.003 -> 0.0001; optim.weight_decay_reference_lr stays 0.003" in result.output
    assert from_yaml(run / "config.yaml").optim.weight_decay_reference_lr == 3e-3


@pytest.mark.ranks
def test_init_from_incompatible_source_is_refused(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    """Refuse a checkpoint of another shape, a missing folder, and keeping the state of another optimizer."""
    train(pool, 1, tmp_path / "first", corpus, "mlm", ["run.steps=1"])
    source = ["--init-from", str(tmp_path / "first")]
    cases = [
        (source, ["model.num_layers=3"], "has model.num_layers=4, this run 3"),
        (["--init-from", str(tmp_path / "none")], [], f"{tmp_path / 'none'}: no such folder"),
        (
            [*source, "--init-optimizer", "keep"],
            ["optim.name=adamw"],
            "was trained with stable_adamw, this run uses adamw",
        ),
    ]
    for options, arguments, message in cases:
        result = pool.run(1, command(tmp_path / "second", corpus, "mlm", ["run.steps=1", *arguments], options))[0]
        assert result.status == 2, result.output
        assert message in result.output, result.output


@pytest.mark.ranks
def test_dataset_with_other_tokenizer_of_same_size_is_refused(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    """Equal shapes are not enough: resuming, --init-from, evaluation and validation are refused."""
    other = make_corpus(tmp_path, make_tokenizer(tmp_path / "tokenizer", range(50, 52)))
    train(pool, 1, tmp_path / "run", corpus, "mlm", ["run.steps=1"])
    source = ["--init-from", str(tmp_path / "run")]
    commands = [
        command(tmp_path / "next", other, "mlm", ["run.steps=1"], source),
        command(tmp_path / "new", corpus, "mlm", ["run.steps=1", f"data.validation={other}"]),
        ["eval", str(tmp_path / "run"), "--data", str(other)],
    ]
    for arguments in commands:
        result = pool.run(1, arguments)[0]
        assert result.status == 2, result.output
        assert "tokenizer" in result.output, result.output
    (resumed,) = pool.run(1, command(tmp_path / "run", other, "mlm", ["run.steps=2"]))
    assert resumed.status == 2
    assert "data.mixture" in resumed.output


@pytest.mark.ranks
def test_train_nan_loss_stops_without_checkpoint(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    arguments = [
        "run.steps=50",
        "optim.lr=1e30",
        "optim.weight_decay_reference_lr=1e30",
        "resilience.max_skips_in_row=2",
    ]
    (result,) = pool.run(1, command(tmp_path, corpus, "mlm", arguments))
    assert result.status == 1
    assert "nan" in result.output
    assert "rows" in result.output
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.ranks
def test_train_locked_run_directory_is_refused(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    """The refusal names the holder of the lock; once it is released the directory can be used."""
    import fcntl

    with open(tmp_path / ".lock", "w") as lock:
        lock.write("process 1 on elsewhere")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = pool.run(1, command(tmp_path, corpus, "mlm", ["run.steps=1"]))[0]
        assert result.status == 2
        assert "process 1 on elsewhere is training in it" in result.output
    train(pool, 1, tmp_path, corpus, "mlm", ["run.steps=1"])


@pytest.mark.ranks
def test_train_refusal_on_two_ranks_is_printed_once(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    results = pool.run(2, command(tmp_path, corpus, "mlm", ["parallel.tp=3"]))
    assert [result.status for result in results] == [2, 2]
    assert "parallel.tp: 3 does not divide" in results[0].output
    assert results[1].output == ""
