"""events.jsonl: what happened to the run's jobs, a line each, over all jobs and requeues."""

import json
import os
import time
from typing import Any, Dict, List


class Events:
    """The file, and what of it decides: how often the run failed since it last moved."""

    def __init__(self, folder: str, job: str) -> None:
        self.path = os.path.join(folder, "events.jsonl")
        self.job = job

    def add(self, event: str, **details: Any) -> None:
        """Append one; a disk that is full does not stop the run."""
        record = {"time": time.time(), "job": self.job, "event": event}
        record.update(details)
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError:
            pass

    def read(self) -> List[Dict[str, Any]]:
        """All events of this job; a torn line is skipped."""
        found = []
        try:
            with open(self.path, encoding="utf-8") as file:
                for line in file:
                    try:
                        record = json.loads(line)
                    except ValueError:
                        continue
                    if record.get("job") == self.job:
                        found.append(record)
        except OSError:
            pass
        return found

    def failures(self) -> List[Dict[str, Any]]:
        """Those since the run last saved something new or was asked to stop: a row of failures without progress."""
        row: List[Dict[str, Any]] = []
        for record in self.read():
            if record["event"] == "saved":
                row = []
            elif record["event"] == "failed":
                if row and (record.get("saved_step") or 0) > (row[-1].get("saved_step") or 0):
                    row = []
                row.append(record)
        return row
