"""metrics.jsonl survives kills, full disks and resumes; a failure of the other sinks does no harm."""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from megatron_ettin.base.errors import UserError
from megatron_ettin.metrics.record import JsonlSink, read_metrics
from megatron_ettin.metrics.sinks import FanOut, TensorBoardSink


def line(step, **more):
    return {"step": step, "loss": 10.0 - step, "rows": [step * 8, step * 8 + 8], **more}


def written(path, steps):
    sink = JsonlSink(path)
    for step in steps:
        sink.log(line(step))
    sink.close()
    return path


def steps_of(path):
    return [values["step"] for values in read_metrics(path)]


def test_jsonl_sink_line_is_readable_at_once(tmp_path):
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.log(line(1))
    assert read_metrics(sink.path) == [line(1)]
    sink.close()


def test_jsonl_sink_nan_and_inf_are_written_as_null(tmp_path):
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.log({"step": 1, "loss": math.nan, "by_source": {"wiki": math.inf}, "name": "é"})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = sink.path.read_text(encoding="utf-8")
    expected = {"step": 1, "loss": None, "by_source": {"wiki": None}, "name": "é"}
    assert json.loads(text, parse_constant=refuse) == expected


def test_jsonl_sink_resume_moves_later_lines_aside(tmp_path):
    path = written(tmp_path / "metrics.jsonl", range(1, 8))
    sink = JsonlSink(path, resume_step=5)
    sink.log(line(6, again=True))
    sink.close()
    assert steps_of(path) == [1, 2, 3, 4, 5, 6]
    assert read_metrics(path)[-1]["again"]
    assert steps_of(tmp_path / "metrics.rolled_back.jsonl") == [6, 7]
    JsonlSink(path, resume_step=4).close()
    assert steps_of(tmp_path / "metrics.rolled_back.jsonl") == [6, 7, 5, 6]


def test_jsonl_sink_resume_killed_midway_is_repeatable(tmp_path):
    path = written(tmp_path / "metrics.jsonl", range(1, 6))
    before = path.read_bytes()
    JsonlSink(path, resume_step=3).close()
    path.write_bytes(before)  # as after a kill between the copy and the removal of the lines
    JsonlSink(path, resume_step=3).close()
    assert steps_of(path) == [1, 2, 3]
    assert steps_of(tmp_path / "metrics.rolled_back.jsonl") == [4, 5]


def test_jsonl_sink_resume_at_last_step_changes_nothing(tmp_path):
    path = written(tmp_path / "metrics.jsonl", [1, 2])
    JsonlSink(path, resume_step=2).close()
    assert steps_of(path) == [1, 2]
    assert not (tmp_path / "metrics.rolled_back.jsonl").exists()


@pytest.mark.parametrize("keep", range(1, len(json.dumps(line(3))) + 1))
def test_metrics_torn_last_line_is_ignored_and_repaired(tmp_path, keep):
    path = written(tmp_path / "metrics.jsonl", [1, 2])
    full_line = json.dumps(line(3)).encode()
    with open(path, "ab") as file:
        file.write(full_line[:keep])
    expected = [1, 2] if keep < len(full_line) else [1, 2, 3]
    assert steps_of(path) == expected
    sink = JsonlSink(path)
    sink.log(line(9))
    sink.close()
    assert steps_of(path) == [*expected, 9]


DAMAGE = [b"\x00\x00", b'{"step": null}', b'{"step": "x"}', b"[1]", b"[" * 20_000]


@pytest.mark.parametrize("damage", DAMAGE, ids=["bytes", "null", "text", "list", "deep"])
def test_metrics_with_damaged_middle_line_are_read_and_continued(tmp_path, capsys, damage):
    path = written(tmp_path / "metrics.jsonl", [1, 2, 3])
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], damage, *lines[2:]]))
    assert steps_of(path) == [1, 3]
    assert f"{path}:2: not a JSON object with a step; left out" in capsys.readouterr().err
    sink = JsonlSink(path, resume_step=3)
    sink.log(line(4))
    sink.close()
    assert "moved to metrics.damaged.jsonl" in capsys.readouterr().err
    assert steps_of(path) == [1, 3, 4]
    assert capsys.readouterr().err == ""
    assert (tmp_path / "metrics.damaged.jsonl").read_bytes() == damage + b"\n"


def test_read_metrics_missing_file_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_metrics(tmp_path / "metrics.jsonl")


@contextlib.contextmanager
def file_size_limit(size_bytes: int) -> Iterator[None]:
    """Limit the size of files that this process writes, which acts like a full quota."""
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, limits[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old)


def test_jsonl_sink_on_full_disk_keeps_lines_until_there_is_room(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    sinks = FanOut([sink])
    sinks.log(line(1))
    full_size = path.stat().st_size
    with file_size_limit(full_size + 10):
        sinks.log(line(2))
        sinks.log(line(3))
        assert sinks.problem == f"{path}: File too large"
        assert path.stat().st_size == full_size
    sinks.log(line(4))
    assert sinks.problem is None
    assert steps_of(path) == [1, 2, 3, 4]
    output = "".join(capsys.readouterr())
    assert output.count("lines wait in memory, and nothing is saved before they are written") == 1
    assert "the 3 lines that waited are written" in output


def test_jsonl_sink_closed_on_full_disk_says_how_many_lines_are_lost(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.log(line(1))
    with file_size_limit(path.stat().st_size + 10):
        sink.log(line(2))
        sink.close()
    assert steps_of(path) == [1]
    assert "File too large; the last line could not be written" in "".join(capsys.readouterr())


def test_jsonl_sink_kill_9_loses_no_logged_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    source = (
        "import sys\nfrom megatron_ettin.metrics.record import JsonlSink\nsink = JsonlSink(sys.argv[1])\n"
        "for step in range(10**9):\n    sink.log({'step': step})\n    print(step, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", source, str(path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    first = process.stdout.readline()
    time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    printed = (first + process.communicate()[0]).split(b"\n")
    last = int(printed[-2])  # the last line that was printed completely
    assert steps_of(path)[: last + 1] == list(range(last + 1))


def test_tensorboard_sink_resume_purges_later_scalars(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = TensorBoardSink(tmp_path)
    for step in (1, 2, 3):
        first.log(line(step, paired=True))
    first.close()
    # files are read in the order of the seconds in their names, so give the first one an earlier second
    (events_file,) = tmp_path.iterdir()
    second_of = events_file.name.split(".")[3]
    events_file.rename(tmp_path / events_file.name.replace(second_of, f"{int(second_of) - 2:010d}", 1))
    second = TensorBoardSink(tmp_path, resume_step=1)
    second.log(line(2, loss=0.5))
    second.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["scalars"] == ["train/loss", "data/rows"]
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 9.0), (2, 0.5)]


def test_fan_out_failing_sink_is_named_once_and_switched_off(tmp_path, capsys):
    (tmp_path / "events").write_text("a file where the directory should be")
    sinks = FanOut([JsonlSink(tmp_path / "metrics.jsonl"), TensorBoardSink(tmp_path / "events")])
    for step in (1, 2, 3):
        sinks.log(line(step))
    sinks.close()
    assert capsys.readouterr().err.count("TensorBoardSink is switched off") == 1
    assert steps_of(tmp_path / "metrics.jsonl") == [1, 2, 3]


def test_metrics_import_imports_no_torch_or_wandb():
    source = "import sys, megatron_ettin.metrics; sys.exit('torch' in sys.modules or 'wandb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", source]).returncode == 0
