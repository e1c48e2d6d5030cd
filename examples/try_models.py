"""Load a converted pair with transformers alone: the encoder fills a mask, the decoder continues a sentence.

python examples/try_models.py ENCODER_FOLDER DECODER_FOLDER
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

MASKED = "Returns a [MASK] of the given values."
PROMPT = "Returns the number of"


def fill_mask(folder: Path, text: str, count: int = 5) -> list[tuple[str, float]]:
    """Return the most probable tokens for the mask in `text`, with their probabilities."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForMaskedLM.from_pretrained(folder).eval()
    inputs = tokenizer(text, return_tensors="pt")
    masked = (inputs.input_ids[0] == tokenizer.mask_token_id).nonzero()[0]
    with torch.inference_mode():
        probabilities = model(**inputs).logits[0, masked].squeeze(0).softmax(-1)
    best = probabilities.topk(count)
    return [(tokenizer.decode([index]), value) for index, value in zip(best.indices.tolist(), best.values.tolist())]


def continue_text(folder: Path, prompt: str, new_tokens: int = 20) -> str:
    """Return `prompt` and the decoder's most probable words after it."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.inference_mode():
        inputs = tokenizer(prompt, return_tensors="pt")
        written = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    return tokenizer.decode(written[0], skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoder", type=Path)
    parser.add_argument("decoder", type=Path)
    options = parser.parse_args()
    disable_progress_bar()
    print(f"encoder: {MASKED}")
    for token, probability in fill_mask(options.encoder, MASKED):
        print(f"  {probability:6.1%} {token!r}")
    print(f"decoder: {PROMPT} ...\n  {continue_text(options.decoder, PROMPT)!r}")


if __name__ == "__main__":
    main()
