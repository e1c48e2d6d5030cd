"""`ettin eval --harness`: refusals. The harnesses themselves run in tests/nightly.sh, in the environment that
$ETTIN_HARNESS names, on local tasks made from the tests' sentences."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from megatron_ettin.cli.main import main
from megatron_ettin.evaluate.harness import check_reading
from tests.conftest import sentences
from tests.convert.folders import make_folder

PYTHON = os.environ.get("ETTIN_HARNESS", "")
LM_TASK = """task: next_word
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
MTEB_TASK = """from datasets import Dataset
from mteb.abstasks import AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata


class LocalSTS(AbsTaskSTS):
    metadata = TaskMetadata(
        name="LocalSTS", description="d", reference=None, type="STS", category="t2t", modalities=["text"],
        eval_splits=["test"], eval_langs=["eng-Latn"], main_score="cosine_spearman",
        dataset={"path": "local", "revision": "1"}, date=("2026-01-01", "2026-01-01"), domains=["Programming"],
        task_subtypes=[], license="mit", annotations_creators="derived", dialect=[], sample_creation="found",
        bibtex_citation="",
    )
    min_score, max_score = 0, 1

    def load_data(self, **kwargs):
        texts = ["the reader follows the next word", "a small model predicts a hidden layer", "one row", "every token"]
        rows = [{"sentence1": a, "sentence2": b, "score": float(a == b)} for a in texts for b in texts]
        self.dataset = {"test": Dataset.from_list(rows)}
        self.data_loaded = True
"""


@pytest.mark.parametrize(
    ("arguments", "output"),
    [
        (
            ["--harness", "lmm", "--tasks", "a"],
            "--harness: 'lmm' does not exist (did you mean 'lm'?); it is one of lm, mteb",
        ),
        (["--harness", "lm"], "--harness lm: name its tasks with --tasks NAME,NAME"),
        (["--harness", "lm", "--tasks", "a", "--task-path", "nowhere"], "--task-path nowhere: no such file or folder"),
        (["--harness", "mteb", "--tasks", "a"], "mteb is not installed; pip install megatron_ettin[harness]"),
        ([], "--data: name a dataset, or --harness"),
    ],
)
def test_eval_harness_bad_options_are_refused(arguments: list[str], output: str, tmp_path: Path, capsys) -> None:
    assert main(["eval", str(tmp_path), *arguments]) == 2
    assert output in capsys.readouterr().err


@pytest.mark.parametrize(
    ("objective", "harness", "output"),
    [
        ("mlm", "lm", "is for decoders, and {} was trained as an encoder; --as decoder evaluates it"),
        ("clm", "mteb", "is for encoders, and {} was trained as a decoder; --as encoder evaluates it"),
    ],
)
def test_eval_harness_of_the_other_objective_is_refused_unless_named(
    objective: str, harness: str, output: str, tmp_path: Path, capsys
) -> None:
    folder, imported = make_folder(tmp_path / "hf", objective), tmp_path / "imported"
    assert main(["convert", "from-hf", str(folder), str(imported)]) == 0
    arguments = ["--harness", harness, "--tasks", "a"]
    capsys.readouterr()
    assert main(["eval", str(imported), *arguments]) == 2
    assert output.format(imported) in capsys.readouterr().err
    # exported as a folder, the encoder has no class that generates
    assert main(["eval", str(folder), *arguments]) == 2
    other = "holds an encoder's class, which cannot generate" if harness == "lm" else output.format(folder)
    assert other in capsys.readouterr().err
    reading = {"lm": "decoder", "mteb": "encoder"}[harness]
    check_reading(harness, imported, reading)
    assert main(["eval", str(imported), *arguments, "--as", {"lm": "encoder", "mteb": "decoder"}[harness]]) == 2
    assert f"--harness {harness} is for {reading}s" in capsys.readouterr().err


def evaluated(folder: Path, *arguments: str) -> dict:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONPATH": os.getcwd()}
    command = [PYTHON, "-m", "megatron_ettin", "eval", str(folder), "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])["results"]


@pytest.mark.skipif(not PYTHON, reason="ETTIN_HARNESS names no python with lm-eval and mteb")
def test_eval_harness_lm_and_mteb_return_scores(tiny_tokenizer: Path, tmp_path: Path) -> None:
    examples = [
        {"text": text, "choices": [" word", " layer", " batch", " context"], "answer": seed % 4}
        for seed, text in enumerate(sentences(seed, 2) for seed in range(24))
    ]
    data = tmp_path / "test.jsonl"
    data.write_text("".join(json.dumps(example) + "\n" for example in examples))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/next_word.yaml").write_text(LM_TASK.format(data=data))
    (tmp_path / "sts.py").write_text(MTEB_TASK)
    folders = {}
    for objective in ("mlm", "clm"):
        theirs, imported = make_folder(tmp_path / objective, objective), tmp_path / f"imported-{objective}"
        shutil.copytree(tiny_tokenizer, theirs, dirs_exist_ok=True)
        assert main(["convert", "from-hf", str(theirs), str(imported)]) == 0
        folders[objective] = imported
    actual = evaluated(
        folders["clm"], "--harness", "lm", "--tasks", "next_word", "--task-path", str(tmp_path / "tasks")
    )
    assert 0 <= actual["next_word"]["acc"] <= 1
    actual = evaluated(
        folders["mlm"], "--harness", "mteb", "--tasks", "LocalSTS", "--task-path", str(tmp_path / "sts.py")
    )
    assert -1 <= actual["LocalSTS"]["main_score"] <= 1
