"""Pickles that say they are larger than they are. Python's unpickler makes room for what an opcode says before it looks
at what is there: eight bytes of a file can ask for tens of gigabytes."""

from __future__ import annotations

import pickle
import pickletools
import struct

_MEMO = ("PUT", "BINPUT", "LONG_BINPUT")
_DEEPEST = 10_000  # marks that are open at once; ours have a handful


def check_pickle(content: bytes) -> None:
    """Raise pickle.UnpicklingError where a length goes beyond the file, or a place in the memo beyond what a file of
    this size can fill."""
    marks = 0
    try:
        for opcode, argument, position in pickletools.genops(content):
            if opcode.name in _MEMO and int(argument or 0) > len(content):
                raise pickle.UnpicklingError(f"byte {position}: memo place {argument:,} in {len(content):,} bytes")
            if opcode.name == "FRAME" and int(argument or 0) > len(content) - (position or 0):
                raise pickle.UnpicklingError(f"byte {position}: a frame of {argument:,} in {len(content):,} bytes")
            if opcode.name == "MARK":
                marks += 1
                if marks > _DEEPEST + len(content) // 16:
                    raise pickle.UnpicklingError(f"byte {position}: {marks:,} marks")
    except (ValueError, OverflowError, LookupError, struct.error) as error:  # what genops makes of damage
        raise pickle.UnpicklingError(str(error)) from None
