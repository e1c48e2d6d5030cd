"""Wrong calls of `ettin release`: one line, status 2, nothing written."""

from __future__ import annotations

import fcntl
import json
import os
import shutil

import pytest

from megatron_ettin.release import build
from tests.fault_injection import no_locks
from tests.release.conftest import files_of, release

pytestmark = pytest.mark.ranks


def test_release_source_that_is_no_run_is_refused(trained, tmp_path, capfd):
    checkpoint = trained / "mlm/pretrain/checkpoints/step_000000005"
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for given, message in (
        (tmp_path / "nothing", "no such folder; give a run directory"),
        (tmp_path / "file", "not a folder; give a run directory"),
        (tmp_path / "empty", "no run directory (config.yaml or checkpoints/ is missing)"),
        (checkpoint, "no run directory (config.yaml or checkpoints/ is missing)"),
    ):
        status, _, err = release(capfd, given, "--out", tmp_path / "out")
        assert (status, err) == (2, f"ettin release: {given}: {message}")
    assert not (tmp_path / "out").exists()


def test_release_run_without_checkpoints_is_refused(trained, tmp_path, capfd):
    shutil.copytree(trained / "mlm/pretrain", tmp_path / "run", ignore=shutil.ignore_patterns("step_*"))
    status, _, err = release(capfd, tmp_path / "run", "--out", tmp_path / "out")
    assert (status, err) == (2, f"ettin release: {tmp_path / 'run'}: the run has no checkpoint yet")
    assert not (tmp_path / "out").exists()


def test_release_with_missing_parent_run_is_refused_unless_alone(trained, tmp_path, capfd):
    shutil.copytree(trained / "mlm/extend", tmp_path / "extend")
    history = tmp_path / "extend/history.jsonl"
    record = json.loads(history.read_text().splitlines()[0])
    gone = {"init_from": "/gone/pretrain/checkpoints/step_000000010", "init_from_relative": "../no/checkpoints/step_4"}
    history.write_text(json.dumps(record | gone) + "\n")
    status, _, err = release(capfd, tmp_path / "extend", "--out", tmp_path / "out")
    assert status == 2
    assert "began from /gone/pretrain" in err
    assert "--alone" in err
    assert not (tmp_path / "out").exists()
    status, _out, err = release(capfd, tmp_path / "extend", "--out", tmp_path / "out", "--alone", "--order", "none")
    assert status == 0, err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["ext1", "ext2", "main", "release.json"]


def test_release_unrelated_runs_are_refused(trained, tmp_path, capfd):
    shutil.copytree(trained / "mlm/extend", tmp_path / "again")
    status, _, err = release(capfd, trained / "mlm/extend", tmp_path / "again", "--out", tmp_path / "out")
    assert status == 2
    assert "both are extend; release each by itself" in err
    config = tmp_path / "again/config.yaml"
    config.write_text(config.read_text().replace("objective: mlm", "objective: clm"))
    status, _, err = release(capfd, trained / "mlm/pretrain", tmp_path / "again", "--out", tmp_path / "out")
    assert status == 2
    assert "trained as clm" in err
    config.write_text(
        config.read_text().replace("objective: clm", "objective: mlm").replace("num_layers: 4", "num_layers: 7")
    )
    status, _, err = release(capfd, trained / "mlm/pretrain", tmp_path / "again", "--out", tmp_path / "out")
    assert status == 2
    assert "another shape" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "0"], "--workers 0: must be at least 1"),
        (["--max-shard-bytes", "0"], "--max-shard-bytes 0: must be at least 1"),
        (["--max-shard-bytes", "much"], "--max-shard-bytes"),
        (["--licence", "a\nb"], "--licence 'a\\nb': give one line of text"),
        (["--dtype", "fp8"], "--dtype"),
        (["--push", "no-owner"], "--push no-owner: give OWNER/NAME"),
        (["--push", "a/b/c"], "--push a/b/c"),
    ],
)
def test_release_bad_options_are_refused(trained, tmp_path, capfd, arguments, message):
    status, _, err = release(capfd, trained / "mlm/pretrain", "--out", tmp_path / "out", *arguments)
    assert status == 2, err
    assert err.startswith("ettin release: "), err
    assert message in err, err
    assert not (tmp_path / "out").exists()


def test_release_unusable_out_folder_is_refused(trained, tmp_path, capfd):
    run, out = trained / "mlm/pretrain", tmp_path / "out"
    out.write_text("")
    status, _, err = release(capfd, run, "--out", out)
    assert (status, err) == (2, f"ettin release: --out {out}: a file is there; name a folder")
    out.unlink()
    out.mkdir()
    (out / "thesis.tex").write_text("")
    status, _, err = release(capfd, run, "--out", out)
    assert (status, err) == (2, f"ettin release: --out {out}: not empty and no release; name a new folder")
    (out / "thesis.tex").unlink()
    index = {"name": "other", "objective": "mlm", "size": "17m"}
    (out / "release.json").write_text(json.dumps(index))
    status, _, err = release(capfd, run, "--out", out)
    assert status == 2
    assert "holds the release of name other, this one has 165K-encoder" in err
    (out / "release.json").write_text("{")
    assert "unreadable" in release(capfd, run, "--out", out)[2]
    handle = os.open(out, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    status, _, err = release(capfd, run, "--out", out)
    os.close(handle)
    assert status == 2
    assert "another `ettin release` is writing there" in err
    assert sorted(path.name for path in out.iterdir()) == ["release.json"]


def test_release_other_weights_under_same_step_need_replace(trained, tmp_path, capfd):
    run, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(trained / "mlm/pretrain", run)
    arguments = (run, "--out", out, "--order", "none")
    assert release(capfd, *arguments)[0] == 0
    before = files_of(out)
    first, second = (run / f"checkpoints/step_{step:09d}" for step in (5, 10))
    shutil.rmtree(first)
    shutil.copytree(second, first)  # other weights under the name of step 5, as if from another run
    status, _, err = release(capfd, *arguments)
    message = (
        f"--out {out}: its step5 is of other weights than {first}; name a new folder, or --replace to make it anew"
    )
    assert (status, err) == (2, f"ettin release: {message}")
    assert files_of(out) == before
    status, reported, err = release(capfd, *arguments, "--replace", "--json")
    assert status == 0, err
    assert json.loads(reported)["made"] == ["step5"], err


def test_release_on_a_file_system_without_locks_warns_and_goes_on(tmp_path, capsys):
    with no_locks(), build._locked(tmp_path / "out", {"name": "a", "objective": "mlm", "size": "17m"}):
        pass
    message = capsys.readouterr().err
    assert message.count("its file system has no locks (Function not implemented)") == 1
    assert (tmp_path / "out" / "release.json").is_file()
