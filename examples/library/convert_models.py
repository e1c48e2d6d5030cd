# %% [markdown]
# Convert to `transformers` and back. `python examples/library/convert_models.py [RUN [FOLDER]]`

# %%
import sys
from pathlib import Path

import torch
from transformers import AutoModelForMaskedLM

from megatron_ettin.api import from_hf, load_checkpoint, to_hf

run = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/library/mlm")
folder = Path(sys.argv[2] if len(sys.argv) > 2 else "exported")

# %% Every tensor is read back and compared, and logits with those of `transformers`.
done = to_hf(run, folder / "encoder")
parity = done["parity"]
print(f"{parity['tensors']} tensors; logits differ by {parity['max_abs_logit_difference']:.1e} at most")

# %% `transformers` alone.
model = AutoModelForMaskedLM.from_pretrained(folder / "encoder").eval()
with torch.no_grad():
    print(model(torch.tensor([[1, 10, 11, 2]])).logits.shape)

# %% And back, to the bit.
from_hf(folder / "encoder", folder / "imported")
ours, theirs = load_checkpoint(run), load_checkpoint(folder / "imported")
assert all(torch.equal(ours.read(name), theirs.read(name)) for name in ours.names())
print(f"{len(ours.names())} tensors are the same bits")
