"""Twelve steps of training against plain PyTorch: a `transformers` model, rows and masks from `ettin order`, and a loss
and StableAdamW that are written out here. Both recipes are tested, at a learning rate at which the loss falls."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_ettin.cli.main import main
from megatron_ettin.config.resolve import from_yaml
from megatron_ettin.convert.to_hf import to_hf
from megatron_ettin.release.revision import write_initial
from megatron_ettin.runs.directory import RunDirectory
from tests.convert.folders import load
from tests.pool import Pool
from tests.train.runs import train

pytestmark = pytest.mark.ranks
STEPS, ROWS = 12, 8
RECIPES = {
    "paired": ["batch.micro_batch_rows=4"],
    "original": ["run.recipe=original", "data.batching=padded", "data.seq_len=48", "batch.micro_batch_rows=4"],
}


def stable_adamw(
    groups: list[list[torch.nn.Parameter]], state: dict, t: int, lr: float, max_lr: float, decay: float
) -> None:
    """Update the parameters with StableAdamW (betas 0.9 and 0.98, eps 1e-6). A group is clipped together, as one tensor
    of the trainer; a decoder layer's q, k and v form one group."""
    for i, group in enumerate(groups):
        m, v = state.setdefault(i, ([torch.zeros_like(p) for p in group], [torch.zeros_like(p) for p in group]))
        ratios = []
        hat = 0.98 * (1 - 0.98 ** (t - 1)) / (1 - 0.98**t)
        for p, mean, square in zip(group, m, v, strict=True):
            mean += 0.1 / (1 - 0.9**t) * (p.grad - mean)
            square.mul_(hat).addcmul_(p.grad, p.grad, value=1 - hat)
            ratios.append((p.grad**2 / square.clamp(min=1e-12)).flatten())
        clipped = lr / max(1.0, torch.cat(ratios).mean().sqrt().item())
        for p, mean, square in zip(group, m, v, strict=True):
            p.data.mul_(1 - clipped / max_lr * (decay if p.ndim > 1 else 0.0))
            p.data.addcdiv_(mean, square.sqrt() + 1e-6, value=-clipped)


def grouped(model: torch.nn.Module) -> list[list[torch.nn.Parameter]]:
    """Group the parameters: q, k and v projections of a decoder layer together, every other parameter alone."""
    groups: dict[str, list[torch.nn.Parameter]] = {}
    for name, p in model.named_parameters():
        key = name.replace("q_proj", "qkv").replace("k_proj", "qkv").replace("v_proj", "qkv")
        groups.setdefault(key, []).append(p)
    return list(groups.values())


def micro_batch(seen, rows: range) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the chunks of these rows as a padded batch: ids, attention mask, labels."""
    chunks = [span for span in seen["spans"].tolist() if span[0] in rows]
    longest = max(end - start for _, start, end in chunks)
    ids, mask, labels = (torch.full((len(chunks), longest), fill) for fill in (0, 0, -100))
    for i, (row, start, end) in enumerate(chunks):
        ids[i, : end - start] = torch.from_numpy(seen["input_ids"][row, start:end])
        labels[i, : end - start] = torch.from_numpy(seen["labels"][row, start:end])
        mask[i, : end - start] = 1
    return ids, mask, labels


def plain_training(model: torch.nn.Module, seen, optim, micro_rows: int, mean_of_means: bool) -> list[float]:
    """Train in plain PyTorch and return the mean loss over predicted tokens of every step."""
    model.model.embeddings.tok_embeddings.padding_idx = (
        None  # a random replacement may be [PAD], which must get a gradient
    )
    state: dict = {}
    losses = []
    groups = grouped(model)
    for step in range(STEPS):
        model.zero_grad()
        parts = [
            micro_batch(seen, range(first, first + micro_rows))
            for first in range(step * ROWS, (step + 1) * ROWS, micro_rows)
        ]
        counts = [int((labels != -100).sum()) for *_, labels in parts]
        total = 0.0
        for (ids, mask, labels), count in zip(parts, counts, strict=True):
            logits = model(input_ids=ids, attention_mask=mask).logits
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=-100)
            (loss / (count * len(parts) if mean_of_means else sum(counts))).backward()
            total += loss.item()
        losses.append(total / sum(counts))
        stable_adamw(groups, state, step + 1, optim.lr, optim.weight_decay_reference_lr, optim.weight_decay)
    return losses


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_train_losses_match_plain_pytorch(
    pool: Pool, corpus: Path, tmp_path: Path, objective: str, recipe: str
) -> None:
    overrides = [f"run.steps={STEPS}", "model.attention_output_dropout=0", *RECIPES[recipe]]
    run = train(pool, 1, tmp_path / "run", corpus, objective, overrides)
    config = from_yaml(tmp_path / "run/config.yaml")
    original = recipe == "original"
    assert (config.batch.loss_normalization == "microbatch") == original
    assert (config.model.output_bias_init == "uniform") == original
    to_hf(write_initial(RunDirectory(tmp_path / "run"), tmp_path / "initial"), tmp_path / "hf")
    assert (
        main(["order", str(tmp_path / "run"), "--steps", f"1:{STEPS + 1}", "--batches", str(tmp_path / "seen.npz")])
        == 0
    )
    seen = dict(np.load(tmp_path / "seen.npz"))
    losses = plain_training(load(tmp_path / "hf", objective), seen, config.optim, 4, mean_of_means=original)
    assert losses[0] - losses[-1] > 1
    assert losses == pytest.approx(run.column("loss"), rel=3e-6)
