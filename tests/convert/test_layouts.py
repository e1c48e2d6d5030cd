"""transformers -> checkpoint -> trained by one rank and by four (tp 2, pp 2) -> transformers: the same bits, for every
published width, both objectives, fp32 and bf16.

Training is a step whose learning rate is zero in float32: the weights go through the ranks' shards, the optimizer's masters and
a checkpoint with optimizer state, and come out as they went in. Widths are exact. The smallest shape has all of its
layers, an odd number for two stages, in every objective and precision; the others have two layers, one a stage, and one
objective and precision each, so that every pair of them is met. tests/nightly.sh has all layers and all pairs
(ETTIN_FULL_SHAPES, names separated by spaces). The vocabulary is odd, so that tensor parallelism pads it; norms, biases
and matrices are those of tests/convert/folders.py, with which any swap of rows or tensors shows."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ettin.config.tables import SIZES
from megatron_ettin.convert.from_hf import from_hf
from megatron_ettin.convert.to_hf import ExportOptions, to_hf
from tests.conftest import make_corpus
from tests.convert.folders import command, make_folder, tensors
from tests.pool import Pool
from tests.train.runs import train

pytestmark = pytest.mark.ranks
FULL = os.environ.get("ETTIN_FULL_SHAPES", "17m").split()
LAYERS = 2  # number of layers of the shapes that are not in FULL
VOCABULARY = 321
ONE, FOUR = (1, []), (4, ["parallel.tp=2", "parallel.pp=2"])
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ARGUMENTS = [
    *("data.seq_len=64", "batch.global_batch_rows=2", "batch.micro_batch_rows=1", "batch.warmup_tokens=0"),
    *("optim.lr=1e-60", "optim.weight_decay=0", "schedule.name=constant", "schedule.warmup_tokens=0"),
    *("runtime.device=cpu", "run.steps=1", "metrics.tensorboard=false", "checkpoint.every_tokens=null"),
]


@pytest.fixture(scope="module")
def odd_corpus(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    """Make a dataset whose tokenizer has an odd number of entries."""
    folder = tmp_path_factory.mktemp("odd")
    shutil.copytree(tiny_tokenizer, folder / "tokenizer")
    path = folder / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"].append(content["added_tokens"][-1] | {"id": VOCABULARY - 1, "content": "[ODD]"})
    path.write_text(json.dumps(content))
    return make_corpus(folder, folder / "tokenizer")


def shape_of(size: str) -> dict[str, int]:
    shape = SIZES[size]
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_hidden_size,
        "num_hidden_layers": shape.num_layers if size in FULL else LAYERS,
        "num_attention_heads": shape.num_attention_heads,
        **{"pad_token_id": 3, "cls_token_id": 1, "bos_token_id": 1, "sep_token_id": 2, "eos_token_id": 2},
    }


def gathers(size: str) -> list[str]:
    """Return overrides that keep a wide shape within memory: one rank gathers a distributed optimizer's state to
    write it, which takes 68 bytes a parameter in all."""
    return ["parallel.distributed_optimizer=false"] if SIZES[size].hidden_size >= 1024 else []


def cases() -> list[Any]:
    """Return (size, objective, precision) as parameters: every combination for the sizes in FULL, one for each other.
    Only the first is not marked `full`."""
    every = [("mlm", "fp32"), ("clm", "bf16"), ("mlm", "bf16"), ("clm", "fp32")]
    listed = []
    for number, size in enumerate(SIZES):
        listed += [(size, *case) for case in (every if size in FULL else [every[number % 4]])]
    return [pytest.param(*case, marks=[pytest.mark.full] * (i > 0)) for i, case in enumerate(listed)]


@pytest.mark.parametrize(("size", "objective", "precision"), cases())
def test_convert_trained_on_one_and_four_ranks_keeps_bits(
    pool: Pool, odd_corpus: Path, tmp_path: Path, size: str, objective: str, precision: str
) -> None:
    shape = shape_of(size)
    theirs = make_folder(tmp_path / "theirs", objective, shape, DTYPES[precision])
    from_hf(theirs, tmp_path / "imported")
    for world, arguments in (ONE, FOUR) if size in FULL else (FOUR,):
        run = tmp_path / f"run-{world}"
        command = ["train", "--size", size, "--objective", objective, "--phase", "pretrain", "--run-dir", str(run)]
        command += ["--init-from", str(tmp_path / "imported"), f"precision.name={precision}", *ARGUMENTS, *arguments]
        command += [f"model.vocab_size={VOCABULARY}", f"model.num_layers={shape['num_hidden_layers']}", *gathers(size)]
        results = pool.run(world, [*command, f"data.mixture={odd_corpus}"], timeout_seconds=600)
        assert {result.status for result in results} == {0}, "\n".join(r.output[-2000:] for r in results)
        to_hf(run, tmp_path / "again", ExportOptions(precision))
        assert_same(theirs, tmp_path / "again", f"{world} ranks")
        shutil.rmtree(tmp_path / "again")
        shutil.rmtree(run)


def assert_same(theirs: Path, again: Path, layout: str) -> None:
    expected, actual = tensors(theirs), tensors(again)
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        same = tensor.dtype == actual[name].dtype and torch.equal(
            tensor.view(torch.uint8), actual[name].view(torch.uint8)
        )
        assert same, f"{name} after {layout}"


@pytest.mark.parametrize(
    ("objective", "precision"), [("clm", "bf16"), pytest.param("mlm", "fp32", marks=pytest.mark.full)]
)
def test_to_hf_of_sharded_training_checkpoint_verifies_and_round_trips(
    pool, corpus, tmp_path, capsys, objective, precision
):
    arguments = ["parallel.tp=2", "parallel.pp=2", "run.steps=2", f"precision.name={precision}"]
    train(pool, 4, tmp_path / "run", corpus, objective, arguments)
    status, out, err = command(capsys, "to-hf", tmp_path / "run", tmp_path / "out", "--verify", "--json")
    assert status == 0, err
    result = json.loads(out)
    assert result["step"] == 2
    assert result["tokenizer"]
    assert result["parity"]["tensors_identical"]
    assert result["parity"]["max_abs_logit_difference"] < 1e-4
    assert command(capsys, "from-hf", tmp_path / "out", tmp_path / "back")[0] == 0
    status, out, err = command(capsys, "to-hf", tmp_path / "back", tmp_path / "again", "--verify", "--json")
    assert status == 0, err
    a, b = (tmp_path / name / "model.safetensors" for name in ("out", "again"))
    assert a.read_bytes() == b.read_bytes()
