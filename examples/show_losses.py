"""Held-out losses of the quick start's pair beside what ignoring all context would reach.

python examples/show_losses.py ENCODER_EVAL.json DECODER_EVAL.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

NAMES = {"mlm": "encoder, masked positions", "clm": "decoder"}


def main(paths: list[str]) -> int:
    """Print the table; 1 where a model is no better than the unigram loss."""
    worse = 0
    for path in paths:
        figures = json.loads(Path(path).read_text(encoding="utf-8"))
        loss, unigram = figures["loss"], figures["unigram_loss"]
        worse += loss >= unigram
        print(f"{NAMES[figures['objective']]}: loss {loss:.3f} on held-out documents, unigram {unigram:.3f}", end="")
        print(f" ({figures['labels']:,} predicted tokens, accuracy {figures['accuracy']:.3f})")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
