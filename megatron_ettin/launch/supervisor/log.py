"""The supervisor's lines in the job's log. What cannot be written is lost: the run is what matters."""

import os

STANDARD_FILES = (0, 1, 2)
ERRORS = 2


def open_standard_files() -> None:
    """Open those that are closed on /dev/null, so that no other file gets their numbers."""
    for number in STANDARD_FILES:
        try:
            os.fstat(number)
        except OSError:
            # the lowest number that is free, which is this one
            os.open(os.devnull, os.O_RDWR)


def write(text: str) -> None:
    """Write to standard error, unbuffered, so that nothing is left that fails at the end. Never raises."""
    left = text.encode("utf-8", "replace")
    try:
        while left:
            left = left[os.write(ERRORS, left) :]
    except OSError:
        pass


def log_line(text: str) -> None:
    """Write a line of the supervisor's own."""
    write("supervisor: " + text + "\n")
