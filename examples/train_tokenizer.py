"""Train a small byte-level BPE tokenizer on text.

  python examples/train_tokenizer.py FILE.jsonl... --vocab 4096 --out DIR

For toys only. The recipe's vocabulary has 50,368 entries; three million tokens of text see most of them a handful of
times, and a model of a few million weights would spend all of them on that table. `ettin prepare --tokenizer DIR` takes
any such folder; without it, the recipe's tokenizer is used.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

ROLES = {
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "mask_token": "[MASK]",
}


def texts(paths: list[Path]) -> Iterator[str]:
    """Yield the documents of .jsonl files (key `text`) and of plain text files; folders are walked in sorted order."""
    for path in paths:
        if path.is_dir():
            yield from texts(sorted(path.iterdir()))
        elif path.suffix == ".jsonl":
            with open(path, encoding="utf-8") as lines:
                yield from (json.loads(line)["text"] for line in lines)
        elif path.suffix in (".txt", ".md", ".rst", ".text"):
            yield path.read_text(encoding="utf-8")


def train(paths: list[Path], entries: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer whose first entries are the five special tokens, with the recipe's template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=entries,
        special_tokens=list(ROLES.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(paths), trainer)
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", type=Path)
    parser.add_argument("--vocab", type=int, default=4096, help="number of entries")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    tokenizer = train(args.inputs, args.vocab)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(args.out / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **ROLES}
    (args.out / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    print(f"{args.out}: {tokenizer.get_vocab_size():,} entries")


if __name__ == "__main__":
    main()
