"""A YAML file of the original trainer: each key is read, ignored with a reason, or refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_ettin.cli.main import main
from megatron_ettin.config.overrides import read_user_config, run_names
from megatron_ettin.config.recipe import recipe
from megatron_ettin.config.resolve import parse
from megatron_ettin.optim.schedule import lr_fraction
from tests.config.original_yaml import original, write
from tests.config.test_explain import FIRST_AND_48

NULL = object()
"""Stand-in for a YAML key without a value."""
NAMES = {"size": None, "objective": None, "phase": None}


@pytest.mark.parametrize(("size", "objective", "phase"), FIRST_AND_48)
def test_original_yaml_resolves_to_original_recipe(size: str, objective: str, phase: str, tmp_path: Path) -> None:
    """The file gives the same config as `recipe: original` with the three names that the file contains."""
    path = write(tmp_path / "original.yaml", original(size, objective, phase))
    actual = run_names(read_user_config(path), path, NAMES)
    assert actual == {
        "size": size,
        "objective": "mntp" if (objective, phase) == ("mlm", "cross") else objective,
        "phase": phase,
    }
    config, wanted = parse(*actual.values(), path), recipe(size, objective, phase, name="original")
    for group in ("run", "model", "optim", "schedule", "data", "batch", "precision"):
        assert getattr(config, group) == getattr(wanted, group), group
    assert config.checkpoint.weights_every_tokens == 8_500_000_000


ONE_MINUS_SQRT = {
    **{"scheduler.name": "one_minus_sqrt", "scheduler.t_decay": "10_000_000_000tok", "scheduler.alpha_f": 0.04},
    "max_duration": "50_000_000_000tok",
}


def run(path: Path, capsys, *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    status = main(["train", "--config", str(path), *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_train_with_original_yaml_reports_steps_and_unused_keys(tmp_path: Path, capsys) -> None:
    path = write(tmp_path / "original.yaml", original("150m", "clm", "pretrain"))
    status, out, err = run(path, capsys, "--dry-run", "--json", "optim.lr=1e-3")
    assert status == 0, err
    message = json.loads(out)
    assert message["steps"] == 599_525
    assert message["config"]["optim"]["lr"] == 1e-3
    assert "left aside (a run reads data.mixture): data_local" in err
    assert "has no model.model_config.local_attn_rotary_emb_base: local layers have the global rotary base" in err
    status, out, _ = run(path, capsys, "--explain")
    assert status == 0
    assert "0 keys differ" in out


def changed(change: dict[str, Any]) -> dict[str, Any]:
    """Return an encoder's file with dotted keys replaced, removed where the value is None, empty where it is NULL."""
    content = original("17m", "mlm", "pretrain")
    for key, value in change.items():
        *parents, last = key.split(".")
        position = content
        for parent in parents:
            position = position.setdefault(parent, {})
        if value is None:
            position.pop(last)
        else:
            position[last] = None if value is NULL else value
    return content


@pytest.mark.parametrize(
    ("change", "key", "value"),
    [
        ({"scheduler.t_warmup": "0.1dur"}, "schedule.warmup_tokens", 170_000_000_000),
        ({"scheduler.t_decay": None}, "schedule.decay_tokens", 170_000_000_000),
        (ONE_MINUS_SQRT, "schedule.decay_tokens", 10_000_000_000),
        (
            {"scheduler.name": "constant_with_warmup", "scheduler.alpha_f": None},
            "schedule.warmup_tokens",
            4_000_000_000,
        ),
        ({"optimizer.name": "adamw", "optimizer.weight_decay": 0.1}, "optim.weight_decay", 3e-4),
        ({"optimizer.name": "adamw", "optimizer.weight_decay": 0.1}, "optim.weight_decay_reference_lr", 3e-3),
        ({"optimizer.name": "decoupled_adamw"}, "optim.name", "adamw"),
        ({"algorithms.gradient_clipping.clipping_threshold": 1.0}, "optim.clip_grad", 1.0),
        ({"train_loader.sequence_packing": True}, "batch.warmup_tokens", 125_000_000_000),
        ({"save_interval": "3500ba"}, "checkpoint.every_steps", 3500),
        ({"eval_interval": "4000ba"}, "metrics.eval_every_steps", 4000),
        ({"device_train_microbatch_size": "auto"}, "batch.micro_batch_rows", 144),
        ({"precision": "fp32"}, "precision.name", "fp32"),
        ({"model.model_config.sliding_window": 256}, "model.decoder_window_keys", 129),
        ({"model.model_config.num_hidden_layers": 9}, "model.num_layers", 9),
    ],
)
def test_original_yaml_changed_key_sets_its_counterpart(
    change: dict[str, Any], key: str, value: Any, tmp_path: Path
) -> None:
    path = write(tmp_path / "original.yaml", changed(change))
    assert parse("17m", "mlm", "pretrain", path).value(key) == pytest.approx(value)


@pytest.mark.parametrize(
    ("arguments", "warmup", "decay"),
    [
        (["run.tokens=5B"], 300_000_000, 10**9),
        (["run.tokens=5B", "schedule.warmup_tokens=1B"], 10**9, 10**9),
        (["schedule.decay_tokens=5B"], 3 * 10**9, 5 * 10**9),
    ],
)
def test_original_yaml_of_shorter_run_keeps_schedule_shares(
    arguments: list[str], warmup: int, decay: int, tmp_path: Path
) -> None:
    path = write(tmp_path / "original.yaml", original("17m", "clm", "cross"))
    schedule = parse("17m", "clm", "cross", path, arguments).schedule
    assert (schedule.warmup_tokens, schedule.decay_tokens) == (warmup, decay)


@pytest.mark.parametrize("before_end", [50e9, 40e9, 30e9, 10e9, 1e9, 0])
def test_original_yaml_one_minus_sqrt_gives_the_trainers_rates(before_end: float, tmp_path: Path) -> None:
    """The original's scheduler is 1 until `t_max - t_decay` and falls over the last `t_decay`."""
    config = parse("17m", "mlm", "decay", write(tmp_path / "original.yaml", changed(ONE_MINUS_SQRT)))
    done = max(0.0, 10e9 - before_end) / 10e9
    expected = 0.04 + 0.96 * (1 - math.sqrt(done))
    assert lr_fraction(50e9 - before_end, config.schedule, config.run.tokens) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("change", "output"),
    [
        (
            {"model.name": "hf_bert"},
            "model.name is 'hf_bert' (did you mean 'flex_bert'?); allowed: flex_bert, flex_gpt",
        ),
        ({"model.model_config.mlp_layer": "mlp"}, "mlp_layer is 'mlp'; our model has it as 'glu' only"),
        (
            {"model.model_config.attn_qkv_bias": True},
            "model.model_config.attn_qkv_bias is True; this system has False only",
        ),
        ({"model.model_config.mlp_dropout_prob": 0.1}, "the MLP has no dropout"),
        ({"model.model_config.causal_mask": True}, "causal_mask is True, but flex_bert is mlm"),
        (
            {"model.model_config.hiden_act": "gelu"},
            "hiden_act is not known (did you mean 'model.model_config.hidden_act'?)",
        ),
        (
            {"scheduler.name": "cosine_with_warmup"},
            "scheduler.name is 'cosine_with_warmup' (did you mean 'constant_with_warmup'?); allowed: warm",
        ),
        ({"scheduler.t_warmup": "2000ba"}, "scheduler.t_warmup is '2000ba'; durations are counted in tokens here"),
        ({"max_duration": "1ep"}, "max_duration is '1ep'; durations are counted in tokens here"),
        ({"max_duration": "1dur"}, "max_duration is '1dur'; give it in tokens"),
        ({"max_duration": None, "scheduler.t_decay": "0tok"}, "max_duration is missing"),
        ({"scheduler.t_max": "5tok"}, "scheduler.t_max is '5tok'; a schedule ends with max_duration"),
        ({"scheduler.t_warmup": None}, "scheduler.t_warmup is missing"),
        ({"scheduler.alpha_f": None}, "scheduler.alpha_f is missing; neither this system nor the original trainer"),
        (ONE_MINUS_SQRT | {"scheduler.t_decay": None}, "scheduler.t_decay is missing"),
        (ONE_MINUS_SQRT | {"scheduler.t_decay": "0tok"}, "scheduler.t_decay is '0tok'; it has to be above 0"),
        (ONE_MINUS_SQRT | {"scheduler.t_decay": "60_000_000_000tok"}, "no more than max_duration"),
        ({"optimizer.eps": None}, "optimizer.eps is missing"),
        (
            {"model.model_config.init_cutoff_factor": NULL},
            "init_cutoff_factor is None; this system has 2 only: weights are drawn within two sigma",
        ),
        ({"optimizer.name": "lion"}, "optimizer.name is 'lion'; allowed: decoupled_stableadamw"),
        ({"optimizer.filter_bias_norm_wd": False}, "norms and biases never decay"),
        ({"optimizer.lr": "fast"}, "optimizer.lr is 'fast'; a number was expected"),
        ({"optimizer.betas": 0.9}, "optimizer.betas is 0.9; two numbers were expected"),
        ({"precision": "amp_fp8"}, "precision is 'amp_fp8'"),
        ({"count_padding_tokens": True}, "tokens counted here are real ones"),
        ({"algorithms.alibi.max_sequence_length": 1}, "algorithms.alibi.max_sequence_length is not known"),
        ({"train_loader.dataset.shuffle": False}, "data is always shuffled"),
        ({"train_loader.dataset.mlm_probability": 0.0}, "mlm_probability is 0, which leaves nothing to predict"),
        ({"max_seq_len": "long"}, "max_seq_len is 'long'; a number of tokens was expected"),
        ({"seed": "${no_such}"}, "no_such"),
        (
            {"model.model_config.num_hidden_layers": 9},
            "--size: is missing (its shape is not one of the published ones)",
        ),
    ],
)
def test_original_yaml_unsupported_value_is_refused_in_one_line(
    change: dict[str, Any], output: str, tmp_path: Path, capsys
) -> None:
    path = write(tmp_path / "original.yaml", changed(change))
    status, _, err = run(path, capsys, "--dry-run")
    assert status == 2, err
    assert output in err.splitlines()[-1], err
    assert len(err.splitlines()) == 1


def test_train_names_contradicting_the_original_yaml_are_refused(tmp_path: Path, capsys) -> None:
    path = write(tmp_path / "original.yaml", original("17m", "mlm", "pretrain"))
    for arguments, output in ((["--size", "1b"], f"--size 1b: {path} has 17m"), (["--objective", "clm"], "has mlm")):
        status, _, err = run(path, capsys, "--dry-run", *arguments)
        assert status == 2
        assert output in err
    assert run(path, capsys, "--dry-run", "--phase", "extend")[0] == 0
    assert main(["train", "--size", "17m", "--phase", "extend", "--dry-run"]) == 2
    assert "--objective: is missing" in capsys.readouterr().err
