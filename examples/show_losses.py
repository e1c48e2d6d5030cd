"""Print the held-out losses of the quick start's pair next to those of guessing by frequency.

python examples/show_losses.py ENCODER_EVAL.json DECODER_EVAL.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

NAMES = {"mlm": "encoder", "clm": "decoder"}
TASKS = {"mlm": "masked tokens", "clm": "next tokens"}


def main(paths: list[str]) -> int:
    """Print the table; return 1 if a model is no better than the unigram loss, else 0."""
    worse = 0
    print(f"{'':9}{'held-out loss':>13}{'unigram loss':>14}{'difference':>12}{'right':>8}  of")
    for path in paths:
        figures = json.loads(Path(path).read_text(encoding="utf-8"))
        loss, unigram, objective = figures["loss"], figures["unigram_loss"], figures["objective"]
        worse += loss >= unigram
        numbers = f"{loss:13.2f}{unigram:14.2f}{loss - unigram:12.2f}{figures['accuracy']:8.1%}"
        print(f"{NAMES[objective]:9}{numbers}  {figures['labels']:,} {TASKS[objective]}")
    print("Lower is better. The unigram loss is what guessing by frequency alone reaches.")
    if worse:
        print("show_losses: no better than guessing by frequency; train longer or on more text", file=sys.stderr)
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
