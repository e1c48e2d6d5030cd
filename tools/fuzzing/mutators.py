"""Make damaged and hostile inputs from good ones: bytes, and with some knowledge JSON, YAML and zips of pickles."""

from __future__ import annotations

import io
import json
import pickle
import random
import struct
import zipfile
from typing import Any

NUMBERS = [0, 1, -1, 127, 255, 2**15, 2**31 - 1, -(2**31), 2**32, 2**53, 2**63 - 1, -(2**63), 2**64 - 1]
VALUES: list[Any] = [
    *(None, True, 0, -1, 1e308, float("nan"), float("-inf"), 2**70, 10**30, "", "a" * 5000, "\0", "\udcff"),
    *("../../etc/passwd", "/etc/passwd", "mlm", [], {}, [[]], [0] * 300, {"": None}, "__import__('os')", "!!python/x"),
]
# pickles that would run code in an unsafe reader
GADGETS = [
    b"cos\nsystem\n(S'touch /tmp/ettin-fuzz-was-here'\ntR.",
    b"cbuiltins\neval\n(S'1'\ntR.",
    b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.",
    b"cbuiltins\ngetattr\n(cbuiltins\nlist\nS'__class__'\ntR.",
    b"ctorch\nload\n(S'x'\ntR.",
    b"\x80\x04" + b"]" * 3000 + b".",
    b"\x80\x02r\xff\xff\xff\x7f.",
]


def mutated_bytes(draw: random.Random, content: bytes, others: list[bytes]) -> bytes:
    """Make one to four changes at random positions."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        at = draw.randrange(len(data) + 1)
        choice = draw.randrange(8)
        if choice == 0 and data:
            data[at % len(data)] ^= 1 << draw.randrange(8)
        elif choice == 1 and data:
            data[at % len(data)] = draw.randrange(256)
        elif choice == 2:
            del data[at : at + draw.choice((1, 2, 8, 64, 1 << 20))]
        elif choice == 3:
            data[at:at] = draw.randbytes(draw.choice((1, 4, 64)))
        elif choice == 4:
            data[at:at] = data[at : at + draw.choice((1, 8, 256))]
        elif choice == 5:
            size = draw.choice("BHIQ")
            number = draw.choice(NUMBERS) & (256 ** struct.calcsize(size) - 1)
            data[at : at + struct.calcsize(size)] = struct.pack("<" + size, number)
        elif choice == 6:
            other = draw.choice(others)
            cut = draw.randrange(len(other) + 1)
            data[at:] = other[cut:]
        else:
            data[at:at] = draw.choice(GADGETS)
    return bytes(data)


def mutated_value(draw: random.Random, value: Any) -> Any:
    """Return a tree with a random value changed, a key removed or one added."""
    if draw.random() < 0.15 or not isinstance(value, (dict, list)) or not value:
        return draw.choice(VALUES)
    if isinstance(value, list):
        at = draw.randrange(len(value))
        choice = draw.randrange(4)
        changed = [mutated_value(draw, value[at])] if choice else []
        return value[:at] + changed + (value[at:] if choice == 3 else value[at + 1 :])
    key = draw.choice(list(value))
    choice = draw.randrange(5)
    if choice == 0:
        return {name: inner for name, inner in value.items() if name != key}
    if choice == 1:
        return {**value, str(draw.choice(VALUES))[:20]: draw.choice(VALUES)}
    return {**value, key: mutated_value(draw, value[key])}


def mutated_json(draw: random.Random, content: bytes, others: list[bytes]) -> bytes:
    """Half of the time return valid JSON, now and then very deep; else changed bytes."""
    if draw.random() < 0.01:
        return draw.choice((b"[" * 100_000, b'{"a":' * 50_000, b"[" + b"1" * 100_000 + b"]"))
    if draw.random() < 0.5:
        return mutated_bytes(draw, content, others)
    return json.dumps(mutated_value(draw, json.loads(content))).encode("utf-8", "replace")


def mutated_yaml(draw: random.Random, content: bytes, others: list[bytes]) -> bytes:
    """Return YAML with anchors that unfold, tags, and nested flow collections."""
    choice = draw.randrange(20)
    if choice == 0:
        levels = b"".join(b"k%d: &a%d [%s]\n" % (i, i, b",".join([b"*a%d" % (i - 1)] * 9)) for i in range(1, 9))
        return b"k0: &a0 x\n" + levels
    if choice == 1:
        return b"run: " + b"[" * draw.choice((50, 5_000)) + b"\n"
    if choice == 2:
        tag = b"\nrun: !!python/object/apply:os.system ['true']\n"
        return content + draw.choice((tag, b"\n? [a]\n: b\n", b"\n&a a: *a\n"))
    if choice < 9:
        return json.dumps(mutated_value(draw, json.loads(others[0]))).encode("utf-8", "replace")
    return mutated_bytes(draw, content, others)


def mutated_zip(draw: random.Random, content: bytes, others: list[bytes]) -> bytes:
    """Half of the time return a zip with right checksums but other bytes, sizes or names in it."""
    if draw.random() < 0.5:
        return mutated_bytes(draw, content, others)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as old:
            records = {info.filename: old.read(info) for info in old.infolist()}
    # written without checksums
    except zipfile.BadZipFile:
        return mutated_bytes(draw, content, others)
    name = draw.choice(list(records))
    records[name] = mutated_bytes(draw, records[name], list(records.values()))
    if draw.random() < 0.1:
        records["../../outside"] = b"x"
    out = io.BytesIO()
    compression = draw.choice((zipfile.ZIP_STORED,) * 5 + (zipfile.ZIP_DEFLATED,))
    with zipfile.ZipFile(out, "w", compression) as new:
        for record, data in records.items():
            new.writestr(record, data)
    return out.getvalue()


def mutated_pickle(draw: random.Random, content: bytes, others: list[bytes]) -> bytes:
    """Return changed bytes, or a pickle of something else."""
    if draw.random() < 0.05:
        return draw.choice(GADGETS)
    if draw.random() < 0.1:
        return pickle.dumps(draw.choice(VALUES[:8]))
    return mutated_bytes(draw, content, others)
