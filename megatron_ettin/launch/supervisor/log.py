"""Write the supervisor's log lines and events.jsonl. If they cannot be written, the run goes on without them."""

import contextlib
import json
import os
import time
from typing import Any, Dict, List

STANDARD_FILES = (0, 1, 2)
ERRORS = 2


def open_standard_files() -> None:
    """Open closed standard files on /dev/null, so that no other file gets their descriptors."""
    for number in STANDARD_FILES:
        try:
            os.fstat(number)
        except OSError:
            # open takes the lowest free number, which is this one
            os.open(os.devnull, os.O_RDWR)


def write(text: str) -> None:
    """Write to standard error without a buffer, which could fail when it is flushed at exit. Never raises."""
    remaining = text.encode("utf-8", "replace")
    try:
        while remaining:
            remaining = remaining[os.write(ERRORS, remaining) :]
    except OSError:
        pass


def log_line(text: str) -> None:
    """Write one line with the prefix `supervisor: `."""
    write("supervisor: " + text + "\n")


class EventLog:
    """Log events.jsonl in `folder`, shared by all jobs of a run and their requeues. Events get the id `job`."""

    def __init__(self, folder: str, job: str) -> None:
        self.path = os.path.join(folder, "events.jsonl")
        self.job = job

    def record(self, event: str, **details: Any) -> None:
        """Append an event with the time and `details`. Raises OSError."""
        entry = {"time": time.time(), "job": self.job, "event": event}
        entry.update(details)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def add(self, event: str, **details: Any) -> None:
        """Append an event as `record` does, but ignore OSError: a full disk must not stop the run."""
        with contextlib.suppress(OSError):
            self.record(event, **details)

    def read(self) -> List[Dict[str, Any]]:
        """Return the events of this job, without torn lines; empty if the file cannot be read."""
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
        """Return this job's `failed` events since it last saved a newer checkpoint, or was stopped and saved."""
        failures: List[Dict[str, Any]] = []
        for record in self.read():
            if record["event"] == "saved":
                failures = []
            elif record["event"] == "failed":
                if failures and (record.get("saved_step") or 0) > (failures[-1].get("saved_step") or 0):
                    failures = []
                failures.append(record)
        return failures
