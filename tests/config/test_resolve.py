"""Precedence, typing, and one-line refusals that name the key and the allowed values."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.text import format_count, parse_count
from megatron_ettin.checkpoint.directory import read_config
from megatron_ettin.config import key_names, overrides
from megatron_ettin.config.layouts import check_layout, full_batch_split, stage_layers
from megatron_ettin.config.overrides import members
from megatron_ettin.config.recipe import recipe
from megatron_ettin.config.resolve import Start, from_yaml, parse, to_yaml
from megatron_ettin.config.schema import science_keys


def test_parse_overrides_win_over_yaml_and_yaml_over_recipe(tmp_path: Path) -> None:
    site = tmp_path / "site.yaml"
    site.write_text("optim: {lr: 1e-3, eps: 1e-8}\nparallel: {tp: 2}\n")
    config = parse("150m", "mlm", "pretrain", site, ["optim.lr=2e-3"])
    assert config.optim.lr == 2e-3  # overrides win over YAML
    assert config.optim.eps == 1e-8  # YAML wins over the recipe
    assert config.parallel.tp == 2
    assert config.optim.weight_decay == recipe("150m", "mlm", "pretrain").optim.weight_decay


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("1.7T", 1_700_000_000_000),
        ("250B", 250 * 10**9),
        ("8_500_000_000", 8_500_000_000),
        ("4096", 4096),
        ("2.5e9", 2_500_000_000),
        ("1_000tok", 1000),
        (12, 12),
    ],
)
def test_parse_count_reads_suffixes_and_plain_numbers(text: str | int, count: int) -> None:
    assert parse_count(text, "run.tokens") == count
    assert (
        parse("17m", "mlm", "pretrain", overrides=[f"run.tokens={text}", "schedule.warmup_tokens=0"]).run.tokens
        == count
    )


def test_format_count_writes_the_short_suffix() -> None:
    assert [format_count(n) for n in (1.7e12, 250e9, 16.9e6, 512)] == ["1.7T", "250B", "16.9M", "512"]


def test_parse_linked_defaults_follow_the_key_that_is_set() -> None:
    config = parse("17m", "clm", "decay", overrides=["optim.lr=1e-3", "data.seq_len=256", "batch.global_batch_rows=4"])
    # twice the rate, the recipe's ratio in the phase decay
    assert config.optim.weight_decay_reference_lr == pytest.approx(2e-3)
    assert config.model.max_position_embeddings == 256
    assert config.batch.micro_batch_rows == 4


def test_parse_of_a_run_that_has_begun_keeps_its_reference_rate() -> None:
    begun = parse("17m", "mlm", "decay", overrides=["optim.weight_decay_reference_lr=5e-3"])
    start = Start(begun=begun)
    assert (
        parse("17m", "mlm", "decay", overrides=["optim.lr=1e-4"], start=start).optim.weight_decay_reference_lr == 5e-3
    )
    assert parse("17m", "mlm", "decay", start=start).optim.weight_decay_reference_lr == 5e-3
    assert (
        parse(
            "17m", "mlm", "decay", overrides=["optim.weight_decay_reference_lr=4e-3"], start=start
        ).optim.weight_decay_reference_lr
        == 4e-3
    )


def test_parse_of_a_run_that_has_begun_with_a_large_decay_goes_on() -> None:
    begun = parse("17m", "mlm", "decay").with_keys({"optim.weight_decay": 0.1})
    start = Start(begun=begun)
    assert parse("17m", "mlm", "decay", overrides=["optim.weight_decay=0.1"], start=start).optim.weight_decay == 0.1
    with pytest.raises(UserError, match=r"optim\.weight_decay: 0\.2 is"):
        parse("17m", "mlm", "decay", overrides=["optim.weight_decay=0.2"], start=start)


def test_to_yaml_round_trip_gives_the_same_config(tmp_path: Path) -> None:
    config = parse("1b", "clm", "extend", overrides=["data.mixture=[{path: a, weight: 2}, {path: b, weight: 1}]"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert from_yaml(tmp_path / "config.yaml") == config


REFUSED = {
    "optim.lrr=1": "unknown key 'optim.lrr' (did you mean 'optim.lr'?)",
    "optm.lr=1": "unknown key 'optm.lr' (did you mean 'optim.lr'?)",
    "optim": "'optim' is not key=value",
    "lr=1": "unknown key 'lr'",
    "run.tokens=many": "run.tokens: 'many' is not a count",
    "model.num_layers=2.5": "model.num_layers: 2.5 is 2.5, not a whole number",
    "optim.lr=fast": "optim.lr: 'fast' is not a number",
    "parallel.sequence_parallel=perhaps": "parallel.sequence_parallel: 'perhaps' is not a bool",
    "parallel.tp=8": "parallel.tp: 8 does not divide 28 heads and ffn_hidden_size 3840; allowed: 1, 2, 4",
    "parallel.cp=3": "parallel.cp: 3 does not divide the 28 heads of a tensor-parallel rank; allowed: 1, 2, 4, 7, 14, 28",
    "parallel.cp=4 parallel.tp=2": "does not divide the 14 heads of a tensor-parallel rank; allowed: 1, 2, 7, 14",
    "parallel.cp=2 batch.loss_normalization=microbatch batch.warmup_tokens=0": "use batch.loss_normalization=global",
    "parallel.recompute=everything": "parallel.recompute: 'everything' does not exist; it is one of none, selective, full",
    "parallel.recompute=selective parallel.recompute_modules=core_atn": "did you mean 'core_attn'?",
    "parallel.recompute_layers=2": "parallel.recompute_layers: needs parallel.recompute=full (found none)",
    "parallel.offload_layers=4 parallel.pp=2": "parallel.offload_layers: works with neither recomputation nor pipeline",
    "parallel.offload_layers=28": "parallel.offload_layers: 28 is not below the model's 28 layers",
    "parallel.vpp=2": "parallel.vpp: 2 model chunks need pipeline stages",
    "parallel.sequence_parallel=true": "parallel.sequence_parallel: needs parallel.tp of 2 or more",
    "precision.name=fp9": "precision.name: 'fp9' does not exist",
    "precision.name=fp8-blockwise parallel.tp=4": "fp8-blockwise needs hidden_size / tp to be a multiple of 128, but it is 1792 / 4",
    "precision.bf16_last_layers=1": "precision.bf16_first_layers, bf16_last_layers: need an FP8 run, but precision.name is bf16",
    "precision.name=fp8-delayed precision.bf16_last_layers=1": "delayed scaling applies to all layers",
    "precision.name=fp32 precision.gradients=bf16": "precision.gradients: bf16 needs a 16-bit or FP8 run",
    "runtime.cuda_graph=true parallel.pp=2": "runtime.cuda_graph: does not work with pipeline stages (found pp 2)",
    "runtime.cuda_graph=true parallel.recompute=full": "does not work with parallel.recompute=full; use parallel.recompute=none",
    "runtime.cuda_graph=true precision.name=fp8-delayed": "whose scales the host updates; use fp8-current",
    "runtime.cuda_graph=true runtime.attention=sdpa": "does not work with runtime.attention=sdpa; use one of te-fused, flash, varlen",
    "parallel.tp_overlap=true": "parallel.tp_overlap: hides the gathers and scatters of sequence parallelism",
    "precision.name=fp8-current precision.bf16_first_layers=28": "28 + 0 leave none of the 28 layers in FP8",
    "optim.name=adamww": "optim.name: 'adamww' does not exist (did you mean 'adamw'?)",
    "optim.weight_decay=0.1": "torch's AdamW multiplies its coefficient by the rate: 0.1 there is 5e-05 here",
    "optim.lr=1e-6": "optim.weight_decay: 5e-05 is what a weight loses a step at optim.weight_decay_reference_lr 1e-06, and more than 10 x",
    "optim.lr=-1": "optim.lr: -1.0 is not allowed; it must be above 0",
    "model.attention_output_dropout=1": "model.attention_output_dropout: 1.0 is not allowed",
    "batch.micro_batch_rows=3 batch.loss_normalization=microbatch": "batch.global_batch_rows: 2816 is not a multiple of micro_batch_rows 3",
    "data.mlm_probability=0": "data.mlm_probability: 0 leaves the encoder nothing to predict",
    "data.seq_len=4096 model.max_position_embeddings=1024": "data.seq_len: 4096 is above model.max_position_embeddings 1024",
    "schedule.name=one_minus_sqrt schedule.decay_tokens=2T": "schedule.decay_tokens: 2000000000000 is more than run.tokens",
    "schedule.name=one_minus_sqrt": "schedule.decay_tokens: one_minus_sqrt decays over them",
    "model.num_attention_heads=30": "30 heads do not divide hidden_size 1792",
    "parallel.pp=2 parallel.pipeline_layers=20,9": "parallel.pipeline_layers: [20, 9] must be 2 whole numbers",
    "batch.loss_normalization=microbatch batch.warmup_tokens=3B": "set batch.warmup_tokens=0 (found 3000000000)",
    "runtime.device=tpu": "runtime.device: 'tpu' does not exist",
}


@pytest.mark.parametrize("arguments", REFUSED)
def test_parse_bad_override_is_refused_in_one_line(arguments: str) -> None:
    with pytest.raises(UserError, match=re.escape(REFUSED[arguments])) as caught:
        parse("1b", "mlm", "pretrain", overrides=arguments.split())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("size", "objective", "phase", "message"),
    [
        ("150", "mlm", "pretrain", "did you mean '150m'?"),
        ("17m", "lm", "pretrain", "did you mean 'mlm'?"),
        ("17m", "mlm", "pretraining", "did you mean 'pretrain'?"),
    ],
)
def test_parse_misspelled_name_suggests_the_right_one(size: str, objective: str, phase: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        parse(size, objective, phase)


def test_parse_unreadable_user_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        parse("17m", "mlm", "pretrain", tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("optim: {lr: 1\n")
    with pytest.raises(UserError, match=r"bad\.yaml:2: not valid YAML"):
        parse("17m", "mlm", "pretrain", tmp_path / "bad.yaml")


def test_check_layout_gives_dp_or_names_the_conflict() -> None:
    config = parse("1b", "mlm", "pretrain", overrides=["parallel.tp=2", "parallel.pp=2", "batch.micro_batch_rows=16"])
    assert check_layout(config, 16) == 4
    with pytest.raises(UserError, match="= 4 does not divide 6 ranks"):
        check_layout(config, 6)
    assert check_layout(config, 20) == 5
    assert full_batch_split(config, 5).empty == 36 * 5 * 16 - 2816
    interleaved = parse(
        "1b", "mlm", "pretrain", overrides=["parallel.pp=4", "parallel.vpp=7", "batch.global_batch_rows=16"]
    )
    with pytest.raises(UserError, match="interleaved schedule needs a multiple of pp 4 micro-batches a step"):
        check_layout(interleaved, 4)


@pytest.mark.parametrize(
    ("size", "arguments", "layers"),
    [
        ("17m", "parallel.pp=2", [6, 1]),
        ("68m", "parallel.pp=4", [5, 5, 6, 3]),
        ("1b", "parallel.pp=4", [7, 7, 7, 7]),
        ("17m", "parallel.pp=2 parallel.vpp=2", [2, 2, 2, 1]),
        ("17m", "parallel.pp=2 parallel.pipeline_layers=3,4", [3, 4]),
    ],
)
def test_stage_layers_split_unevenly_over_stages(size: str, arguments: str, layers: list[int]) -> None:
    assert stage_layers(parse(size, "mlm", "pretrain", overrides=arguments.split())) == layers


OLD_LISTS = {
    "parallel.pipeline_layers": ("3,4", "[3, 4]"),
    "parallel.recompute_modules": ("core_attn, mlp", "[core_attn, mlp]"),
    "data.skip": ("0:8,16:24", "[[0, 8], [16, 24]]"),
    "profile.steps": ("5:8", "[5, 8]"),
    "profile.ranks": ("0,8", "[0, 8]"),
}


@pytest.mark.parametrize("key", OLD_LISTS)
def test_parse_and_from_yaml_read_lists_and_their_older_texts(key: str, tmp_path: Path) -> None:
    old, new = OLD_LISTS[key]
    one, other = (parse("17m", "mlm", "pretrain", overrides=["parallel.pp=2", f"{key}={text}"]) for text in (old, new))
    assert one == other
    assert isinstance(one.value(key), list)
    group, name = key.split(".")
    content = yaml.safe_load(to_yaml(one))
    content[group][name] = old
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    assert from_yaml(tmp_path / "config.yaml") == one
    (tmp_path / "user.yaml").write_text(yaml.safe_dump({"parallel": {"pp": 2}, **{group: content[group]}}))
    assert parse("17m", "mlm", "pretrain", tmp_path / "user.yaml", ["parallel.pp=2"]) == one


@pytest.mark.parametrize(
    ("word", "same"),
    [("profile.ranks=all", "profile.ranks=null"), ("profile.steps=5", "profile.steps=[5, 6]"), ("data.skip=[]", "")],
)
def test_parse_short_forms_of_lists_equal_long_forms(word: str, same: str) -> None:
    assert parse("17m", "mlm", "pretrain", overrides=[word]) == parse(
        "17m", "mlm", "pretrain", overrides=[same] if same else []
    )


def test_older_names_of_keys_are_read_with_one_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_names, "_noted", set())
    # an empty value counts as unset
    monkeypatch.setenv("RANK", "")
    old, new = (
        ["parallel.pp=2", f"parallel.{vpp}=2", f"optim.{reference}=4e-3"]
        for vpp, reference in (("vp", "max_lr"), ("vpp", "weight_decay_reference_lr"))
    )
    config = parse("17m", "mlm", "decay", overrides=new)
    assert capsys.readouterr().err == ""
    assert parse("17m", "mlm", "decay", overrides=old) == config
    (tmp_path / "user.yaml").write_text("phases: {decay: {parallel: {pp: 2, vp: 2}, optim: {max_lr: 4e-3}}}\n")
    assert parse("17m", "mlm", "decay", tmp_path / "user.yaml") == config
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config).replace("vpp:", "vp:").replace("weight_decay_reference_lr:", "max_lr:"))
    assert "max_lr" in path.read_text()
    assert from_yaml(path) == config
    assert science_keys(from_yaml(path)) == science_keys(config)
    assert read_config(tmp_path)["optim"]["weight_decay_reference_lr"] == 4e-3
    assert capsys.readouterr().err.splitlines() == [
        "note: parallel.vp is called parallel.vpp now; the older name is still read",
        "note: optim.max_lr is called optim.weight_decay_reference_lr now; the older name is still read",
    ]
    assert members(["parallel.vp=1,2"]) == members(["parallel.vpp=1,2"])


def test_parse_of_older_and_new_name_together_is_refused() -> None:
    config = "optim.weight_decay_reference_lr: optim.max_lr is its older name, and both are set"
    with pytest.raises(UserError, match=re.escape(config)):
        overrides.check_keys({"optim": {"max_lr": 1, "weight_decay_reference_lr": 1}})


def test_science_keys_ignore_operations_keys() -> None:
    """Layout, micro-batch, precision and sinks are no science keys, so a resume may change them."""
    base = science_keys(parse("17m", "mlm", "pretrain"))
    operations = (
        "parallel.tp=2 batch.micro_batch_rows=8 precision.name=fp32 checkpoint.keep=9 metrics.wandb=true run.steps=5"
    )
    assert science_keys(parse("17m", "mlm", "pretrain", overrides=operations.split())) == base
    for word in (
        "optim.lr=1e-4",
        "run.seed=3",
        "data.seq_len=512",
        "batch.global_batch_rows=1408",
        "model.init_std=0.01",
        "resilience.on_nonfinite=stop",
        "resilience.on_spike=skip",
        "resilience.spike_sigmas=7",
        "resilience.spike_window=64",
        "resilience.spike_ratio=3",
    ):
        assert science_keys(parse("17m", "mlm", "pretrain", overrides=[word])) != base, word


def test_parse_phase_settings_apply_to_that_phase_only(tmp_path: Path) -> None:
    site = tmp_path / "site.yaml"
    site.write_text(
        "recipe: original\noptim: {lr: 1e-3}\nphases:\n  extend: {optim: {lr: 2e-3}, data: {mixture: long}}\n"
    )
    arguments = ["optim.eps=1e-7", "extend.optim.eps=1e-8", "decay.optim.lr=4e-3"]
    pretrain, extend, decay = (parse("17m", "mlm", phase, site, arguments) for phase in ("pretrain", "extend", "decay"))
    assert [c.optim.lr for c in (pretrain, extend, decay)] == [1e-3, 2e-3, 4e-3]
    assert [c.optim.eps for c in (pretrain, extend, decay)] == [1e-7, 1e-8, 1e-7]
    assert [c.data.mixture for c in (pretrain, extend, decay)] == [None, "long", None]
    assert pretrain.run.recipe == "original"
    assert pretrain.data.batching == "padded"


@pytest.mark.parametrize(
    ("text", "arguments", "output"),
    [
        (
            "phases: {extnd: {}}",
            [],
            "phases: 'extnd' (did you mean 'extend'?); allowed: pretrain, extend, decay, cross",
        ),
        ("phases: 3", [], "phases: a mapping of phases was expected, found 3"),
        ("phases: {extend: {optim: {lrr: 1}}}", [], "unknown key 'optim.lrr'"),
        ("", ["decay.optim.lrr=1"], "unknown key 'optim.lrr'"),
    ],
)
def test_parse_mistake_in_other_phase_settings_is_refused(
    text: str, arguments: list[str], output: str, tmp_path: Path
) -> None:
    """Refuse mistakes in the settings of a later phase when the first phase is parsed."""
    site = tmp_path / "site.yaml"
    site.write_text(text)
    with pytest.raises(UserError, match=re.escape(output)):
        parse("17m", "mlm", "pretrain", site, arguments)


@pytest.mark.parametrize(
    ("phase", "arguments", "shares"),
    [
        ("pretrain", ["run.tokens=17B"], (40_000_000, 0, None)),
        ("pretrain", ["run.tokens=3.4T"], (8 * 10**9, 0, None)),
        ("decay", ["run.tokens=5B"], (0, 5 * 10**9, None)),
        ("cross", ["run.tokens=5B"], (300_000_000, 10**9, None)),
        ("cross", ["run.tokens=5B", "schedule.decay_tokens=2B"], (300_000_000, 2 * 10**9, None)),
        ("cross", ["run.tokens=5B", "schedule.end_tokens=100B"], (6 * 10**9, 20 * 10**9, 100 * 10**9)),
    ],
)
def test_parse_warmup_and_decay_are_the_recipes_shares_of_the_run(
    phase: str, arguments: list[str], shares: tuple[int, int, int | None]
) -> None:
    schedule = parse("17m", "mlm", phase, overrides=arguments).schedule
    assert (schedule.warmup_tokens, schedule.decay_tokens, schedule.end_tokens) == shares


@pytest.mark.parametrize(
    ("arguments", "rows", "micro"),
    [
        (["data.seq_len=8192"], 352, 11),
        (["data.seq_len=512"], 5_632, 176),
        (["data.seq_len=1000"], 2_880, 90),
        (["data.seq_len=131072"], 22, 1),
        (["data.seq_len=1M"], 3, 1),
        (["data.seq_len=8192", "batch.micro_batch_rows=16"], 352, 16),
        (["data.seq_len=8192", "batch.global_batch_rows=88"], 88, 88),
        (["data.seq_len=2048", "data.batching=padded"], 4_608, 144),
    ],
)
def test_parse_rows_of_another_length_keep_the_tokens_of_a_step(arguments: list[str], rows: int, micro: int) -> None:
    batch = parse("17m", "mlm", "pretrain", overrides=arguments).batch
    assert (batch.global_batch_rows, batch.micro_batch_rows) == (rows, micro)


def test_parse_of_a_run_that_has_begun_keeps_its_schedule_and_batch() -> None:
    """A run begun under earlier defaults keeps them when its keys are parsed again, unless the key is given."""
    old = ["batch.warmup_tokens=125B", "schedule.warmup_tokens=4B", "batch.warmup_min_rows=88"]
    arguments = ["data.seq_len=2048", "run.tokens=1T"]
    begun = parse("17m", "mlm", "pretrain", overrides=[*arguments, *old, "batch.global_batch_rows=2816"])
    start = Start(begun=begun)
    assert science_keys(parse("17m", "mlm", "pretrain", overrides=arguments, start=start)) == science_keys(begun)
    assert (
        parse(
            "17m", "mlm", "pretrain", overrides=[*arguments, "batch.warmup_tokens=0"], start=start
        ).batch.warmup_tokens
        == 0
    )


def test_from_yaml_of_an_earlier_version_keeps_its_early_decay(tmp_path: Path) -> None:
    """Earlier versions decayed over a run's first tokens. If the decay spans the whole run, today's schedule is
    equal."""
    path = tmp_path / "config.yaml"
    for decay, end in ((20_000, 20_000), (50_000, None)):
        arguments = ["run.tokens=50_000", f"schedule.decay_tokens={decay}"]
        path.write_text(to_yaml(parse("17m", "mlm", "decay", overrides=arguments)).replace("  end_tokens: null\n", ""))
        assert from_yaml(path).schedule.end_tokens == end
