"""`ettin compare` on run directories: verdicts, named differences of runs that are no pair, and the files written."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser

import pytest

from megatron_ettin.cli.main import main
from megatron_ettin.report.compare import compare
from megatron_ettin.report.plots import panels
from tests.report.synthetic import write_run
from tests.report.test_document import numbers


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """Return a run that tests must not change."""
    return write_run(tmp_path_factory.mktemp("runs") / "encoder")


def compared(first, second):
    comparison = compare([first, second])
    return comparison.verdict, {check.name: check.detail for check in comparison.failed}


def test_compare_runs_differing_only_in_objective_are_paired(tmp_path, encoder):
    assert compared(encoder, write_run(tmp_path / "decoder", "clm")) == ("PAIRED", {})


def test_compare_different_operations_keys_are_still_paired(tmp_path, encoder):
    overrides = ("parallel.tp=2", "batch.micro_batch_rows=4", "precision.name=fp32", "runtime.device=cpu")
    assert compared(encoder, write_run(tmp_path / "decoder", "clm", overrides=overrides)) == ("PAIRED", {})


def test_compare_model_of_unpublished_shape_is_not_named_by_size(tmp_path):
    overrides = ("model.num_layers=2", "model.hidden_size=64", "model.ffn_hidden_size=96", "model.vocab_size=2048")
    runs = [write_run(tmp_path / objective, objective, overrides=overrides) for objective in ("mlm", "clm")]
    assert [chain.name for chain in compare(runs).chains] == ["207K mlm", "207K clm"]


def test_compare_phases_named_by_the_alphabet_are_joined_in_training_order(tmp_path):
    runs = [write_run(tmp_path / phase, phase=phase) for phase in ("decay", "extend", "pretrain")]
    (chain,) = compare(runs).chains
    assert chain.phases == ["pretrain", "extend", "decay"]


def test_compare_picture_draws_the_evaluation_of_a_short_phase(tmp_path):
    runs = [write_run(tmp_path / phase, phase=phase, steps=60) for phase in ("pretrain", "decay")]
    losses = dict(panels(compare(runs).chains))["loss"]
    (validation,) = [curve for curve in losses.curves if curve.label == "validation loss"]
    assert [len(x) for x, _ in validation.segments] == [1, 1]
    assert validation.is_sparse


def test_compare_picture_of_folder_with_formula_characters_is_drawn(tmp_path):
    runs = [write_run(tmp_path / name) for name in ("plain", r"x$\frac{$y")]
    assert main(["compare", *map(str, runs), "--out", str(tmp_path / "out.html")]) == 0
    assert (tmp_path / "out.png").read_bytes()[:4] == b"\x89PNG"


def test_compare_two_runs_of_one_objective_are_same_training(tmp_path, encoder):
    assert compared(encoder, write_run(tmp_path / "again", overrides=("parallel.tp=2",))) == ("SAME TRAINING", {})


@pytest.mark.parametrize(
    ("changes", "check", "shown"),
    [
        ({"overrides": ("optim.weight_decay=0.01",)}, "optimizer", "optim.weight_decay: 0.0003 and 0.01"),
        ({"overrides": ("run.seed=7",)}, "phase and seed", "run.seed: 21 and 7"),
        ({"overrides": ("schedule.decay_tokens=5M",)}, "schedule", "schedule.decay_tokens: 100000 and 5000000"),
        ({"overrides": ("run.tokens=5M",)}, "schedule", "run.tokens: 1000000000 and 5000000"),
        ({"overrides": ("batch.warmup_tokens=5M",)}, "batch and rows", "batch.warmup_tokens: 0 and 5000000"),
        ({"overrides": ("data.seq_len=512",)}, "batch and rows", "data.seq_len: 1024 and 512"),
        ({"overrides": ("model.num_layers=6",)}, "model shape", "model.num_layers: 7 and 6"),
        ({"fingerprint": "ab" * 32}, "data order", f"fingerprint: {'5f' * 32} and {'ab' * 32}"),
        ({"fingerprint": ""}, "data order", "order.json has no fingerprint"),
        ({"fingerprint": 5}, "data order", "order.json has no fingerprint"),
        ({"rows": {9: [512, 577]}}, "rows of every step", "step 9: [512, 576] and [512, 577]"),
        ({"rows": {9: None}}, "rows of every step", "step 9: rows was not recorded"),
        ({"tokens": {12: 5}}, "tokens of every step", "step 12: "),
        ({"lr": {3: 0.5}}, "learning rate of every step", "step 3: "),
        ({"overrides": ("resilience.on_spike=skip",)}, "bad steps", "resilience.on_spike: warn and skip"),
        ({"updated": {9: False}}, "updates of every step", "left out in mlm: none; in clm: 9"),
        (
            {"updated": dict.fromkeys((3, 7, 8, 9), False)},
            "updates of every step",
            "left out in mlm: none; in clm: 3, 7 to 9",
        ),
        ({"bad": {9: "skipped: loss is nan"}}, "updates of every step", "left out in mlm: none; in clm: 9"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_compare_difference_breaks_the_pair_and_is_named(tmp_path, encoder, changes, check, shown):
    verdict, failed = compared(encoder, write_run(tmp_path / "decoder", "clm", **changes))
    assert verdict == "NOT PAIRED"
    assert shown in failed[check]


def test_compare_key_changed_during_the_run_breaks_the_pair(tmp_path, encoder):
    decoder = write_run(tmp_path / "decoder", "clm")
    with open(decoder / "history.jsonl", "a", encoding="utf-8") as history:
        history.write(json.dumps({"changes": ["optim.lr"]}) + "\n")
    assert compared(encoder, decoder) == ("NOT PAIRED", {"no change on the way": "decoder: optim.lr"})


def test_compare_decoder_window_counts_as_part_of_the_objective(tmp_path, encoder):
    decoder = write_run(tmp_path / "decoder", "clm", overrides=("model.decoder_window_keys=65",))
    assert compared(encoder, decoder) == ("PAIRED", {})
    assert compared(decoder, write_run(tmp_path / "other", "clm"))[0] == "NOT PAIRED"


def without_guard(run):
    """Rewrite a run as that version would have recorded it that judged spikes by mean and standard deviation."""
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(
        re.sub(r"  spike_ratio: .*\n", "", config).replace("on_spike: warn", "on_spike: skip")
    )
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    old = [{key: value for key, value in line.items() if key != "updated"} for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in old))
    return run


def with_checkpoint(run, step, skipped):
    """Add a checkpoint of this step whose progress has `skipped` skipped updates."""
    folder = run / "checkpoints" / f"step_{step:09d}"
    folder.mkdir(parents=True)
    (folder / "progress.json").write_text(json.dumps({"step": step, "tokens": 1, "skipped": skipped}))
    return run


def test_compare_updates_left_out_in_both_are_named_in_verdict_page_and_json(tmp_path, capsys):
    changed = {"updated": {9: False}, "bad": {9: "skipped: loss is nan"}}
    runs = [str(write_run(tmp_path / objective, objective, **changed)) for objective in ("mlm", "clm")]
    out = tmp_path / "pair.html"
    assert main(["compare", *runs, "--out", str(out)]) == 0
    shown = "pdates left out: 17m mlm pretrain 9; 17m clm pretrain 9"
    assert f"PAIRED: 17m mlm / 17m clm (u{shown})\n" in capsys.readouterr().out
    assert f"U{shown}" in out.read_text(encoding="utf-8")
    assert main(["compare", *runs, "--out", str(out), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [model["updates_left_out"] for model in answer["models"]] == [{"pretrain": [9]}] * 2


def test_compare_update_left_out_after_the_common_steps_does_not_break_the_pair(tmp_path, encoder):
    decoder = write_run(tmp_path / "decoder", "clm", steps=50, updated={45: False})
    assert compared(encoder, decoder) == ("PAIRED", {})


def test_compare_older_runs_are_judged_by_their_updates_alone(tmp_path, encoder):
    decoder = without_guard(write_run(tmp_path / "decoder", "clm"))
    assert compared(encoder, decoder) == ("PAIRED", {})
    skipped = without_guard(write_run(tmp_path / "skipped", "clm", bad={9: "skipped: gradient norm 2 is above 1"}))
    assert compared(encoder, skipped)[0] == "NOT PAIRED"


def test_compare_older_ignored_step_needs_checkpoint_that_counts_skips(tmp_path, encoder):
    decoder = without_guard(write_run(tmp_path / "decoder", "clm", bad={9: "ignored: gradient norm 2 is above 1"}))
    shown = f"{decoder}: whether the update of step 9 was made was not recorded"
    assert compared(encoder, decoder) == ("NOT PAIRED", {"updates of every step": shown})
    assert compared(encoder, with_checkpoint(decoder, 20, skipped=0)) == ("PAIRED", {})
    shown = f"{decoder}: the checkpoint of step 30 counts 1 updates that were left out, metrics.jsonl names 0"
    assert compared(encoder, with_checkpoint(decoder, 30, skipped=1)) == (
        "NOT PAIRED",
        {"updates of every step": shown},
    )


def test_compare_running_run_uses_the_common_steps(tmp_path, encoder):
    decoder = write_run(tmp_path / "decoder", "clm", steps=15)
    with open(decoder / "metrics.jsonl", "a", encoding="utf-8") as metrics:
        metrics.write('{"step": 16, "tok')
    comparison = compare([encoder, decoder])
    assert comparison.verdict == "PAIRED"
    assert comparison.without_partner == "17m mlm pretrain 25"
    assert "15 common steps (1 to 15; recorded 40 and 15)" in [check.detail for check in comparison.checks]


def test_compare_later_phase_continues_the_token_axis(tmp_path):
    runs = [
        write_run(tmp_path / objective / phase, objective, phase, steps=20)
        for objective in ("mlm", "clm")
        for phase in ("pretrain", "decay")
    ]
    comparison = compare(runs)
    assert comparison.verdict == "PAIRED"
    models = comparison.chains
    assert models[0].phases == ["pretrain", "decay"]
    first, second = (axes["tokens"] for axes in models[0].axes())
    assert second[0] == first[-1] + 64_001
    assert dict(panels(models))["loss"].marks == [(0.0, "pretrain"), (first[-1], "decay")]
    shorter = compare(runs[:3])
    assert {check.name for check in shorter.failed} == {"phases"}


def test_compare_runs_with_same_name_get_distinct_chain_names(tmp_path):
    runs = [write_run(tmp_path / name / "run", steps=3) for name in ("a", "b")]
    names = [chain.name for chain in compare(runs).chains]
    assert len(set(names)) == 2


class Links(HTMLParser):
    """Collect the URLs in a page that a browser would fetch, and tags that are not closed."""

    def __init__(self, text):
        super().__init__()
        self.fetched, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.fetched += [value for name, value in attributes if name in ("src", "href")]
        if tag in ("script", "link", "img", "iframe"):
            self.fetched.append(tag)
        if tag not in ("meta", "br", "link", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        assert tag in ("path", "line", "circle")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_compare_page_fetches_nothing_and_shows_differences(tmp_path, encoder, capsys):
    decoder = write_run(tmp_path / "<b>decoder", "clm", steps=130, overrides=("optim.lr=1e-3",))
    out = tmp_path / "reports" / "pair.html"
    assert main(["compare", str(encoder), str(decoder), "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "differs: optimizer (pretrain): optim.lr: 0.003 and 0.001" in shown
    assert "NOT PAIRED: 17m mlm / 17m clm" in shown
    text = out.read_text(encoding="utf-8")
    links = Links(text)
    assert set(links.fetched) <= {"link", "data:,", "#curves", "script"}
    assert links.open == []
    assert "default-src 'none'" in text
    assert not re.search(r"url\((?!#)|@import", text)
    assert "<b>decoder" not in text
    assert "&lt;b&gt;decoder" in text
    assert "<title>NOT PAIRED: 17m mlm / 17m clm</title>" in text
    assert "optim.lr: 0.003 and 0.001" in text
    assert {chart["id"] for chart in numbers(text)["charts"]} == {"loss", "lr", "grad_norm", "speed"}
    assert len(text) < 200_000
    assert out.with_suffix(".png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert sorted(path.name for path in out.parent.iterdir()) == ["pair.html", "pair.png"]


def test_compare_json_and_require_paired_set_the_exit_status(tmp_path, encoder, capsys):
    decoder = write_run(tmp_path / "decoder", "clm", overrides=("run.seed=3",))
    out = tmp_path / "pair.html"
    arguments = ["compare", str(encoder), str(decoder), "--out", str(out), "--json"]
    assert main([*arguments, "--require-paired"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["verdict"] == "NOT PAIRED"
    assert [check["name"] for check in answer["checks"] if not check["passed"]] == ["phase and seed"]
    assert [model["steps"] for model in answer["models"]] == [40, 40]
    assert main(arguments) == 0
    assert main(["compare", str(encoder), "--out", str(out), "--require-paired"]) == 0
    assert "ONE MODEL" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("damage", "shown"),
    [
        (lambda run: (run / "config.yaml").unlink(), "no run directory"),
        (lambda run: (run / "metrics.jsonl").unlink(), "metrics.jsonl: No such file"),
        (lambda run: (run / "metrics.jsonl").write_text(""), "holds no step yet"),
        (lambda run: (run / "order.json").write_text("{"), "order.json: unreadable"),
        (lambda run: (run / "order.json").write_text("3"), "order.json: holds a int, not an object"),
        (lambda run: (run / "config.yaml").write_text("run: {"), "config.yaml"),
    ],
)
def test_compare_unreadable_run_is_refused_in_one_line(encoder, tmp_path, capsys, damage, shown):
    run = shutil.copytree(encoder, tmp_path / "run")
    damage(run)
    out = tmp_path / "pair.html"
    assert main(["compare", str(run), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert shown in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_compare_page_without_html_suffix_is_refused(encoder, tmp_path, capsys):
    assert main(["compare", str(encoder), "--out", str(tmp_path / "pair.pdf")]) == 2
    assert "must end in .html" in capsys.readouterr().err
