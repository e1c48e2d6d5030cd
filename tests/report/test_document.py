"""`ettin report` by its command line: pages of runs in any state, which no content of a run can break."""

from __future__ import annotations

import base64
import json
import re
import shlex
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest

from megatron_ettin.cli.main import main
from megatron_ettin.report.facts import embedded
from tests.report.synthetic import write_run
from tests.train.runs import read

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = "</script><img src=x onerror=alert(1)>"
TOKEN = "hf_" + "q" * 30


def reported(out: Path, *arguments: object) -> str:
    """Write the page of runs and return its text."""
    assert main(["report", *map(str, arguments), "--out", str(out)]) == 0
    return out.read_text(encoding="utf-8")


def numbers(page: str) -> dict[str, Any]:
    """Return the JSON data that the page's script draws."""
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    return json.loads(text)


def section(page: str, name: str) -> str:
    (text,) = re.findall(rf'<section id="{name}">(.*?)</section>', page, re.S)
    return text


def floats(text: str) -> list[float]:
    raw = base64.b64decode(text)
    return list(struct.unpack(f"<{len(raw) // 4}f", raw))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture
def run(written: Path, tmp_path: Path) -> Path:
    """Return a run that a test may change."""
    return shutil.copytree(written, tmp_path / "run")


@pytest.fixture
def page(tmp_path: Path) -> Path:
    return tmp_path / "page.html"


def test_report_of_trained_pair_holds_curves_and_marks_of_the_runs(
    trained: Path, page: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = reported(page, trained / "mlm", trained / "clm", "--title", "A pair")
    assert capsys.readouterr().out.startswith("NOT PAIRED: 165K mlm / 165K clm\n")
    assert "<title>A pair</title>" in text
    assert '<span class="verdict bad">NOT PAIRED</span>' in section(text, "comparison")
    assert "Updates left out: 165K mlm pretrain 3; 165K clm none." in section(text, "comparison")
    drawn = numbers(text)
    assert [model["name"] for model in drawn["models"]] == ["165K mlm", "165K clm"]
    assert drawn["axes"] == ["tokens", "steps", "hours"]
    assert {"loss", "lr", "speed", "memory"} <= {chart["id"] for chart in drawn["charts"]}
    for model, name in zip(drawn["models"], ("mlm", "clm")):
        pretrain, extend = model["runs"]
        assert (pretrain["phase"], pretrain["n"], extend["phase"], extend["n"]) == ("pretrain", 6, "extend", 3)
        lines = read(trained / name / "pretrain").metrics
        losses = floats(pretrain["series"]["loss"]["y"])
        assert losses == pytest.approx([line["loss"] for line in lines], rel=1e-6)
        assert extend["span"]["steps"] == [7, 9]
        assert extend["span"]["tokens"][0] > pretrain["span"]["tokens"][1]
    encoder, decoder = (model["runs"][0]["marks"] for model in drawn["models"])
    assert [(mark["kind"], mark["steps"]) for mark in encoder] == [("restart", 4.0), ("bad", 3.0)]
    assert "gradient norm is nan" in encoder[1]["text"]
    assert decoder == []


def test_report_of_trained_pair_lists_data_layout_bad_steps_and_checkpoints(
    trained: Path, corpus: Path, page: Path
) -> None:
    text = reported(page, trained / "mlm", trained / "clm")
    assert section(text, "data-consumed").count(f"<code>{corpus}</code>") == 2
    assert section(text, "layout").count("dp 2") == 2
    assert "auto" not in section(text, "layout")
    launches = section(text, "environment")
    assert launches.count("<tr>") == 1 + 5
    assert "torch" in launches
    assert "Hosts: not recorded" not in launches
    bad = section(text, "bad-steps")
    assert bad.count("<tr>") == 1 + 1
    assert "skipped: gradient norm is nan" in bad
    assert "bad_steps/step_000000003.parquet" in bad
    saved = section(text, "checkpoints")
    assert "milestone" in saved
    assert saved.count("in their recorded sizes") == saved.count('class="good">whole')
    assert saved.count("verified in hf: tensors equal, logits within") == 1
    assert 'class="bad"' not in saved
    assert "batch.micro_batch_rows" in section(text, "configuration")


def test_report_quickstart_command_writes_page_and_figures(trained: Path, tmp_path: Path) -> None:
    script = (ROOT / "examples" / "quickstart.sh").read_text(encoding="utf-8")
    (arguments,) = re.findall(r"^ +ettin (report .*)$", script, re.M)
    root = tmp_path / "out"
    root.mkdir()
    for objective in ("mlm", "clm"):
        (root / objective).symlink_to(trained / objective)
    assert main(shlex.split(arguments.replace("$out", str(root)))) == 0
    last = script.rpartition("<<END")[2].replace("$out", str(root))
    assert "PAIRED" in (root / "pair.html").read_text(encoding="utf-8")
    assert f"{root}/pair.html" in last
    assert f"{root}/figures" in last
    assert (root / "figures" / "loss.png").exists()


def test_report_damaged_checkpoint_is_marked(trained: Path, tmp_path: Path, page: Path) -> None:
    copy = shutil.copytree(trained / "mlm" / "extend", tmp_path / "copy")
    (newest,) = (copy / "checkpoints").glob("step_*")
    (newest / "progress.json").write_text("{}   ")
    assert "</span>: progress.json: 5 bytes, but " in section(reported(page, copy), "checkpoints")
    (newest / "integrity.json").write_text('{"files": 3}')
    assert '<span class="bad">damaged</span>' in section(reported(page, copy), "checkpoints")


def test_report_of_run_or_folder_lists_the_models_in_it(tmp_path: Path, run: Path, page: Path) -> None:
    write_run(tmp_path / "other", "clm")
    assert [model["name"] for model in numbers(reported(page, run))["models"]] == ["17m mlm"]
    both = numbers(reported(page, tmp_path))
    assert [model["name"] for model in both["models"]] == ["17m clm", "17m mlm"]
    text = reported(page, run)
    assert section(text, "comparison") == ""
    assert "NOT PAIRED" not in text


def test_report_validation_loss_of_earlier_phase_names_that_phase(tmp_path: Path, page: Path) -> None:
    phases = [write_run(tmp_path / "pretrain", steps=60), write_run(tmp_path / "extend", phase="extend")]
    (evaluated,) = [line for line in read(phases[0]).metrics if "validation_loss" in line]
    loss = f"{evaluated['validation_loss']:.4f}"
    shown = f"<dt>validation loss</dt><dd>{loss}<small>lowest {loss}{{}}</small></dd>"
    assert shown.format(" in pretrain") in section(reported(page, *phases), "cards")
    assert shown.format("") in section(reported(page, phases[0]), "cards")


def test_report_of_broken_pair_names_the_difference_first(tmp_path: Path, run: Path, page: Path) -> None:
    text = reported(page, run, write_run(tmp_path / "other", "clm", overrides=("run.seed=3",)))
    shown = section(text, "comparison")
    assert "NOT PAIRED" in shown
    assert shown.index("run.seed: 21 and 3") < shown.index("All checks")


def test_report_page_without_out_goes_into_the_run(run: Path) -> None:
    assert main(["report", str(run)]) == 0
    assert [path.name for path in (run / "report").iterdir()] == ["report.html"]
    # the report's own folder is not read as a run
    assert main(["report", str(run)]) == 0


def test_report_torn_metrics_lines_are_skipped_and_counted(run: Path, page: Path) -> None:
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 41, "tok')
    text = reported(page, run)
    assert numbers(text)["models"][0]["runs"][0]["n"] == 40
    assert "could not be read" not in text
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b'\n\xff\xfe\n[1]\n{"step": 42, "tokens": 99000000, "loss": 3.0}\n')
    text = reported(page, run)
    assert numbers(text)["models"][0]["runs"][0]["n"] == 41
    assert "3 lines of metrics.jsonl could not be read" in section(text, "environment")


def test_report_of_partly_written_metrics_uses_whole_lines(run: Path, page: Path) -> None:
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    for end in (1, 7):  # in the middle of a line too
        (run / "metrics.jsonl").write_bytes(b"".join(lines[:end]) + lines[end][:30])
        drawn = numbers(reported(page, run))
        assert drawn["models"][0]["runs"][0]["n"] == end


@pytest.mark.parametrize("left", [("config.yaml",), ("config.yaml", "metrics.jsonl")])
def test_report_of_run_without_steps_draws_no_chart(
    run: Path, page: Path, left: tuple[str, ...], tmp_path: Path
) -> None:
    for path in run.iterdir():
        if path.name not in left:
            path.unlink()
        elif path.name == "metrics.jsonl":
            path.write_text("")
    text = reported(page, run)
    assert numbers(text)["charts"] == []
    assert '<p class="soft" id="empty">No step is recorded yet.' in text
    other = write_run(tmp_path / "beside", "clm")
    assert numbers(reported(page, run, other))["charts"][0]["id"] == "loss"


def test_report_malformed_files_are_passed_over(run: Path, page: Path) -> None:
    deep = "[" * 100_000
    for name in ("order.json", "history.jsonl", "bad_steps.jsonl", "metrics.rolled_back.jsonl"):
        (run / name).write_text(f"{deep}\n[]\n3\n")
    (run / "watch").mkdir()
    (run / "watch" / "rank_0.json").write_text('{"host": ["a"]}')
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": true, "loss": 1}\n{"step": -3, "loss": 1}\n{"loss": 1}\n{"step": "x"}\n')
        file.write('{"step": 41, "loss": {"a": 1}, "tokens": null, "lr": 1e400, "grad_norm": ' + "9" * 400 + "}\n")
        file.write("{" + "".join(f'"validation_loss/{n}": 1, ' for n in range(5_000)) + '"step": 42}\n')
    drawn = numbers(reported(page, run))
    assert drawn["models"][0]["runs"][0]["n"] == 42
    assert page.stat().st_size < 2_000_000


def test_report_repeated_step_keeps_the_latest_value(run: Path, page: Path) -> None:
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 39, "tokens": 2496000, "loss": 7.5}\n')
    series = numbers(reported(page, run))["models"][0]["runs"][0]["series"]
    assert len(floats(series["loss"]["y"])) == 40
    assert floats(series["loss"]["y"])[38] == 7.5


def test_report_rolled_back_bad_steps_are_not_counted(tmp_path: Path, page: Path) -> None:
    """Of bad steps before a rollback, list only those that were bad again. List one that ended the latest launch.

    Leave out a step that was good when it was trained again, and one that has not been reached again."""
    run = write_run(tmp_path / "run", bad={7: "skipped: again"})
    launches = [(0, "2026-01-01T00:00:00+0000"), (0, "2026-01-02T00:00:00+0000"), (40, "2026-01-03T00:00:00+0000")]
    lines = [json.dumps({"time": time, "step": step, "changes": []}) for step, time in launches]
    (run / "history.jsonl").write_text("\n".join(lines) + "\n")
    day, first = 86_400, 1_767_225_600
    bad = [(5, 0.5), (7, 0.5), (90, 0.5), (41, 2.5)]
    entries = [{"step": step, "outcome": "stopped", "why": "w", "time": first + days * day} for step, days in bad]
    (run / "bad_steps.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    text = reported(page, run)
    rows = re.findall(r"<tr>(.*?)</tr>", section(text, "bad-steps"), re.S)[1:]
    assert [re.findall(r"<td[^>]*>(\d+)</td>", row) for row in rows] == [["7"], ["41"]]
    # the third launch recorded no step, so it has no mark
    (model,) = numbers(text)["models"]
    assert [mark["steps"] for mark in model["runs"][0]["marks"] if mark["kind"] == "restart"] == [1.0]


def test_report_page_hostile_text_is_escaped(tmp_path: Path, page: Path) -> None:
    folder = tmp_path / "a&b<i>"
    run = write_run(folder, loss={5: None})
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config + f"extra:\n  '{HOSTILE}': '{HOSTILE}'\n  mixture: '{HOSTILE}'\n")
    (run / "history.jsonl").write_text(json.dumps({HOSTILE: HOSTILE, "layout": HOSTILE, "changes": [HOSTILE]}) + "\n")
    (run / "bad_steps.jsonl").write_text(json.dumps({"step": 5, "why": HOSTILE, "documents": HOSTILE}) + "\n")
    (run / "order.json").write_text(json.dumps({"fingerprint": HOSTILE}))
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"step": 41, f"validation_loss/{HOSTILE}": 1.0, "bad": HOSTILE}) + "\n")
    text = reported(page, run, "--title", HOSTILE)
    assert "<img" not in text
    assert text.count("</script>") == 2
    assert "<i>" not in text
    assert "a&amp;b&lt;i&gt;" in text
    assert f"validation_loss/{HOSTILE}" in numbers(text)["models"][0]["runs"][0]["series"]
    assert json.loads(embedded(HOSTILE)) == HOSTILE


def test_report_page_fetches_nothing(run: Path, page: Path) -> None:
    text = reported(page, run)
    assert "default-src 'none'" in text
    assert "connect-src 'none'" in text
    assert set(re.findall(r'(?:src|href)="?([^" >]+)', text)) == {"data:,", "#curves"}
    assert not re.search(r"url\((?!#)|@import", text)


def test_report_page_hides_secrets(run: Path, page: Path) -> None:
    config = (run / "config.yaml").read_text()
    lines = [f"api_key: {'9' * 8}", f"store: https://me:{'s' * 9}@host/x", f"note: 'use {TOKEN}'"]
    (run / "config.yaml").write_text(config + "extra:\n" + "".join(f"  {line}\n" for line in lines))
    (run / "history.jsonl").write_text(json.dumps({"from": f"https://host/x?X-Amz-Signature={TOKEN}&a=1"}) + "\n")
    text = reported(page, run, "--title", f"of {TOKEN}")
    assert TOKEN not in text
    assert "9" * 8 not in text
    assert "s" * 9 not in text
    assert text.count("(hidden)") >= 5
    assert "X-Amz-Signature=(hidden)&amp;a=1" in text
    snapshot = "models/snapshots/" + "0123456789" * 4
    (run / "history.jsonl").write_text(json.dumps({"from": snapshot}) + "\n")
    assert snapshot in reported(page, run)  # a commit's hash is not taken for a secret key


def test_report_bad_arguments_are_refused_in_one_line(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (run / "config.yaml").write_text("run: {")
    for arguments, shown in (
        ([tmp_path / "none"], "no such folder"),
        ([run / "order.json"], "not a folder"),
        ([tmp_path / "empty"], "no run directory"),
        ([run], "config.yaml: unreadable"),
        ([run, "--out", tmp_path / "page.pdf"], "must end in .html"),
        ([run, "--release", tmp_path], "not an output of `ettin release`"),
        ([run, "--watch", "0", "--out", tmp_path / "page.html"], "nothing is written with --watch"),
        (["--watch", run], "runs stand before --watch"),
    ):
        assert main(["report", *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert shown in error, error
        assert error.count("\n") == 1, error


def test_report_unwritable_output_is_refused_in_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for arguments in (
        ["--out", tmp_path / "file" / "page.html"],
        ["--out", tmp_path / "a.html", "--png", tmp_path / "file"],
    ):
        assert main(["report", str(run), *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert f"{arguments[-2]} {arguments[-1]}: cannot be written" in error
        assert error.count("\n") == 1


def test_report_figures_are_png_and_reproducible_svg(
    tmp_path: Path, run: Path, page: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_run(tmp_path / "other", "clm", steps=130)
    reported(page, run, other, "--png", tmp_path / "png", "--svg", tmp_path / "svg", "--json")
    shown = json.loads(capsys.readouterr().out)
    names = {"loss", "lr", "grad_norm", "speed"}
    assert {Path(path).stem for path in shown["figures"]} == names
    assert len(shown["figures"]) == 8
    assert all((tmp_path / "png" / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n") for name in names)
    svg = (tmp_path / "svg" / "loss.svg").read_text()
    assert "<svg" in svg
    # text is drawn as text, not as outlines
    assert "17m mlm, training loss" in svg
    assert "validation_loss" not in svg
    reported(page, run, other, "--svg", tmp_path / "again")
    assert (tmp_path / "again" / "loss.svg").read_text() == svg


def test_report_json_describes_page_and_models(run: Path, page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reported(page, run, "--json")
    shown = json.loads(capsys.readouterr().out)
    assert shown["page"] == str(page)
    assert shown["bytes"] == page.stat().st_size
    (model,) = shown["models"]
    assert (model["name"], model["phases"], model["steps"]) == ("17m mlm", ["pretrain"], 40)
    assert shown["verdict"] is None
    assert model["runs"] == [str(run)]
    assert model["tokens"] > 40 * 64_000


def cards_of(run: Path, page: Path) -> str:
    return re.sub("<[^>]+>", " ", section(reported(page, run), "cards"))


def test_report_card_says_parameters_and_shape(tmp_path: Path, page: Path) -> None:
    overrides = ("model.num_layers=2", "model.hidden_size=64", "model.ffn_hidden_size=96", "model.vocab_size=2048")
    run = write_run(tmp_path / "run", overrides=overrides)
    assert "parameters  207K 2 layers x 64, vocabulary 2,048 (from 17m)" in cards_of(run, page)


def test_report_card_says_time_device_hours_and_commit(tmp_path: Path, page: Path) -> None:
    run = write_run(tmp_path / "run", steps=40, step_seconds=dict.fromkeys(range(1, 41), 90.0))
    launches = [{"step": 0, "world": 2, "commit": "aaaa"}, {"step": 20, "world": 4, "commit": "bbbb+"}]
    (run / "history.jsonl").write_text("".join(json.dumps(one) + "\n" for one in launches))
    shown = cards_of(run, page)
    assert "time in steps  1h 0m 3 device-hours" in shown
    assert "bbbb+  and 1 before it" in shown


def test_report_layout_says_what_was_used_instead_of_auto(run: Path, page: Path) -> None:
    assert "auto (as configured)" in section(reported(page, run), "layout")
    (run / "history.jsonl").write_text(json.dumps({"step": 0, "device": "cpu", "attention": "sdpa"}) + "\n")
    shown = section(reported(page, run), "layout")
    assert "auto" not in shown
    assert "<td>sdpa</td>" in shown


def test_report_ranks_of_equal_speed_draw_no_chart_of_the_slowest(tmp_path: Path, page: Path) -> None:
    run = write_run(tmp_path / "run", slowest_ratio=dict.fromkeys((10, 20), 1.05))
    text = reported(page, run, "--png", tmp_path / "figures")
    assert "slowest" not in {chart["id"] for chart in numbers(text)["charts"]}
    assert not (tmp_path / "figures" / "slowest.png").exists()


def test_report_model_colours_do_not_depend_on_order(tmp_path: Path, run: Path, page: Path) -> None:
    other = write_run(tmp_path / "other", "clm")
    for named in ((run, other), (other, run)):
        models = numbers(reported(page, *named))["models"]
        assert {model["name"]: model["colour"] for model in models} == {"17m mlm": 0, "17m clm": 1}


def test_report_figures_of_folders_with_formula_characters_are_drawn(tmp_path: Path, page: Path) -> None:
    runs = [write_run(tmp_path / name) for name in ("plain", r"x$\frac{$y")]
    reported(page, *runs, "--png", tmp_path / "figures")
    assert (tmp_path / "figures" / "loss.png").exists()


def test_report_names_the_slowest_host(tmp_path: Path, page: Path) -> None:
    hosts = {10: "node-a", 20: "node-b", 30: "node-a", 40: "node-a"}
    run = write_run(tmp_path / "run", slowest_host=hosts, slowest_ratio=dict.fromkeys(hosts, 1.5))
    text = reported(page, run)
    assert "the slowest rank was on node-a in 3 of 4 comparisons" in section(text, "environment")
    assert "Hosts: node-a, node-b." in section(text, "environment")
    assert "slowest" in {chart["id"] for chart in numbers(text)["charts"]}


def test_report_mixture_shows_share_of_each_source(tmp_path: Path, run: Path, page: Path) -> None:
    config = (run / "config.yaml").read_text()
    sources = [{"name": "web", "tokens": 3}, {"name": "books", "tokens": 1}]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "manifest.json").write_text(json.dumps({"tokens": 1_000_000, "sources": sources}))
    entries = f"mixture: [{{path: {tmp_path}/a, weight: 3}}, {{path: {tmp_path}/b, weight: 1}}]"
    assert "mixture: null" in config
    (run / "config.yaml").write_text(config.replace("mixture: null", entries))
    shown = re.sub("<[^>]+>", " ", section(reported(page, run), "data-consumed"))
    rows = [line.split() for line in shown.splitlines() if "%" in line]
    assert [row[1] for row in rows] == ["75.0%", "56.2%", "18.8%", "25.0%"]
    assert rows[0][-1] == "1.92"
    assert rows[3][0] == f"{tmp_path}/b"
