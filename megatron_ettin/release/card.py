"""Write README.md of `main`: the final revision's card, with its training, its data and the list of revisions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_ettin.base.text import format_count
from megatron_ettin.config.schema import Config
from megatron_ettin.config.tables import OBJECTIVES
from megatron_ettin.convert.model_card import THIS_FOLDER, planned_tokens
from megatron_ettin.runs.chain import PhaseChain

CURVE = "training_curve.png"


def main_card(
    final_card: str,
    chain: PhaseChain,
    records: Sequence[dict[str, Any]],
    orders: dict[str, dict[str, Any]],
    has_curve: bool,
    repository: str | None = None,
) -> str:
    """Return the text of README.md of `main`.

    Args:
        final_card: the card of the last revision.
        chain: the runs that were released.
        records: release.json of every revision with its parity.json as `parity`, oldest first.
        orders: phase -> entry of its data order in the index.
        has_curve: whether `main` has a training curve.
        repository: OWNER/NAME on the hub that the release will be pushed to; None: the examples use folders.
    """
    text = final_card.rstrip()
    if repository is not None:
        text = text.replace(THIS_FOLDER, f'FOLDER = "{repository}"')
    parts = [text, *_training(chain, records)]
    if has_curve:
        parts += [f"![Loss, learning rate and gradient norm against tokens]({CURVE})"]
    parts += [*_data(chain, orders), *_revisions(records, repository)]
    return "\n\n".join(parts) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table with the column names `head`."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _training(chain: PhaseChain, records: Sequence[dict[str, Any]]) -> list[str]:
    trained = _tokens_trained(chain, records)
    columns = [{"tokens trained": tokens} | _recipe(run.config) for run, tokens in zip(chain.runs, trained)]
    rows = [[key, *(column[key] for column in columns)] for key in columns[0]]
    notes = [f"{note[0].upper()}{note[1:]}." for note in chain.notes]
    return ["## Training", table(["", *(run.phase for run in chain.runs)], rows), *notes]


def _tokens_trained(chain: PhaseChain, records: Sequence[dict[str, Any]]) -> list[str]:
    """Return, for each phase, the tokens of `main` as text, up to the checkpoint that the next phase began from."""
    before = {one["phase"]: one["total_tokens"] - one["tokens"] for one in records}
    phases = [run.phase for run in chain.runs]
    ends = [*(before.get(phase) for phase in phases[1:]), records[-1]["total_tokens"]]
    texts = []
    for phase, end in zip(phases, ends, strict=True):
        begin = before.get(phase)
        texts.append("not recorded" if begin is None or end is None else format_count(end - begin))
    return texts


def _recipe(config: Config) -> dict[str, str]:
    """Return the table rows on the settings that a reader needs to repeat a phase."""
    optim, schedule, batch = config.optim, config.schedule, config.batch
    parallel = config.parallel
    rows = {
        "tokens planned": planned_tokens(dataclasses.asdict(config.run)),
        "row length": f"{config.data.seq_len:,} tokens",
        "rows a step": f"{batch.global_batch_rows:,}",
        "optimizer": f"{optim.name}, betas {optim.beta1:g} and {optim.beta2:g}, eps {optim.eps:g}",
        "learning rate": f"{optim.lr:g}, {schedule.name}",
        "warm-up, decay": f"{format_count(schedule.warmup_tokens)}, {format_count(schedule.decay_tokens)} tokens",
        "final learning rate": f"{schedule.final_lr_fraction:g} of the peak",
        "weight decay": f"{optim.weight_decay:g} at a learning rate of {optim.weight_decay_reference_lr:g}",
        "gradient clipping": f"{optim.clip_grad:g}" if optim.clip_grad else "none",
        "precision": config.precision.name,
        "layout": f"tp {parallel.tp}, pp {parallel.pp}",
        "seed": str(config.run.seed),
    }
    if OBJECTIVES[config.run.objective].is_hybrid:
        rows["causal rows"] = str(config.data.clm_fraction)
    if OBJECTIVES[config.run.objective].needs_mask_token:
        rows["masked"] = f"{config.data.mlm_probability:.0%} of tokens"
    return rows


def _data(chain: PhaseChain, orders: dict[str, dict[str, Any]]) -> list[str]:
    parts = ["## Data"]
    for run in chain.runs:
        if shares := run.dataset_shares:
            # names, because a path of this host means nothing to a reader
            names = dataset_names([path for path, _ in shares])
            texts = ["by its size" if share is None else f"{share:.2%}" for _, share in shares]
            rows = list(zip(names, texts, strict=True))
            parts += [f"{run.phase}:", table(["dataset", "share of tokens"], rows)]
    if orders:
        files = [
            [f"`data_order/{order['file']}`", phase, f"1 to {order['last_step']:,}", f"`{order['fingerprint'][:16]}`"]
            for phase, order in orders.items()
        ]
        head = ["file", "phase", "steps", "fingerprint of the order"]
        parts += ["Which document stood where in every step, as `ettin order` writes it:", table(head, files)]
    return parts


def dataset_names(paths: Sequence[str | Path]) -> list[str]:
    """Return a name for each path: its last parts, as many as make the names of all distinct paths distinct."""
    parts = [Path(path).parts for path in paths]
    longest = max(map(len, parts), default=1)
    for depth in range(1, longest + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(set(map(str, paths))):
            return names
    return [str(path) for path in paths]


def _revisions(records: Sequence[dict[str, Any]], repository: str | None) -> list[str]:
    rows = [
        [
            *(f"`{one['revision']}`", one["phase"], f"{one['step']:,}", format_count(one["total_tokens"])),
            f"{one['parity']['max_abs_logit_difference']:.1e}",
        ]
        for one in records
    ]
    last = records[-1]["revision"]
    where = f'"../{last}"' if repository is None else f'"{repository}", revision="{last}"'
    return [
        "## Revisions",
        f"`main` is `{last}`. Every revision has its own parity.json: each tensor equals the checkpoint's bit for bit,"
        " and logits differ from those of the training code by at most what the last column says.",
        f"```python\nfrom transformers import AutoModel\n\nAutoModel.from_pretrained({where})\n```",
        table(["revision", "phase", "step", "tokens so far", "logit difference"], rows),
    ]
