"""Write the supervisor's log lines and events.jsonl. What cannot be written is lost, because the run matters more."""

import contextlib
import json
import os
import time
from typing import Any, Dict, List

STANDARD_FILES = (0, 1, 2)
ERRORS = 2


def open_standard_files() -> None:
    """Open closed standard files on /dev/null, so that no other file gets their numbers."""
    for number in STANDARD_FILES:
        try:
            os.fstat(number)
        except OSError:
            # open takes the lowest free number, which is this one
            os.open(os.devnull, os.O_RDWR)


def write(text: str) -> None:
    """Write to standard error without a buffer, so that nothing fails at exit. Never raises."""
    left = text.encode("utf-8", "replace")
    try:
        while left:
            left = left[os.write(ERRORS, left) :]
    except OSError:
        pass


def log_line(text: str) -> None:
    """Write one line of the supervisor itself."""
    write("supervisor: " + text + "\n")


class EventLog:
    """events.jsonl: what happened to the run's jobs, one line each, over all jobs and requeues."""

    def __init__(self, folder: str, job: str) -> None:
        self.path = os.path.join(folder, "events.jsonl")
        self.job = job

    def record(self, event: str, **details: Any) -> None:
        """Append an event. Raises OSError."""
        entry = {"time": time.time(), "job": self.job, "event": event}
        entry.update(details)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def add(self, event: str, **details: Any) -> None:
        """Append an event. A full disk does not stop the run."""
        with contextlib.suppress(OSError):
            self.record(event, **details)

    def read(self) -> List[Dict[str, Any]]:
        """Return the events of this job. Torn lines are skipped."""
        events = []
        try:
            with open(self.path, encoding="utf-8") as file:
                for line in file:
                    try:
                        record = json.loads(line)
                    except ValueError:
                        continue
                    if isinstance(record, dict) and record.get("job") == self.job and "event" in record:
                        events.append(record)
        except OSError:
            pass
        return events

    def failures(self) -> List[Dict[str, Any]]:
        """Return the failures since the run last made progress: saved a newer checkpoint or was asked to stop."""
        failures: List[Dict[str, Any]] = []
        for record in self.read():
            if record["event"] == "saved":
                failures = []
            elif record["event"] == "failed":
                if failures and (record.get("saved_step") or 0) > (failures[-1].get("saved_step") or 0):
                    failures = []
                failures.append(record)
        return failures
