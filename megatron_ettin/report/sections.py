"""Write the text and the tables of a page as HTML. Text that comes from files goes through `escaped`."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.text import duration, format_count
from megatron_ettin.checkpoint.directory import read_progress
from megatron_ettin.config.tables import long_name
from megatron_ettin.report import facts
from megatron_ettin.report.compare import Check, Comparison
from megatron_ettin.report.facts import escaped
from megatron_ettin.runs.chain import LAST_STEPS, SECONDS_AN_HOUR, PhaseChain, final_loss
from megatron_ettin.runs.directory import RunDirectory

NONE = "none"
# largest number of launches of a run, or of bad steps, in a table
MOST_ROWS = 200
VERDICTS = {
    "PAIRED": "Same shape, data order, schedule, optimizer and batch; same rows, tokens and updates at every common"
    " step. Losses of two objectives share an axis here, not a meaning: compare the shapes, not the heights.",
    "SAME TRAINING": "Everything that shapes the result is the same, the objective too.",
    "ONE MODEL": "There is nothing to compare it with.",
}
AXES = ("tp", "pp", "vpp", "cp")


def table(
    caption: str,
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    numbers: Sequence[int] = (),
    quiet: bool = False,
    none: str = "",
) -> str:
    """Return an HTML table.

    Args:
        caption: caption, as HTML.
        heads: heads of the columns.
        rows: cells of each row, as HTML.
        numbers: indices of the columns that are aligned to the right.
        quiet: whether only screen readers get the caption, because a heading above has the same text.
        none: text that replaces a table without rows; if it is empty, the table is returned without rows.
    """
    if none and not rows:
        return _soft(none)
    classes = [" class=number" if column in numbers else "" for column in range(len(heads))]
    head = "".join(f"<th scope=col{one}>{name}</th>" for one, name in zip(classes, heads))
    cells = ("".join(f"<td{one}>{cell}</td>" for one, cell in zip(classes, row)) for row in rows)
    body = "\n".join(f"<tr>{row}</tr>" for row in cells)
    title = f"<caption{' class=sr' * quiet}>{caption}</caption>"
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{caption}"><table>{title}'
        f"<thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>"
    )


def number(value: float | None, form: str = ",") -> str:
    """Return a number in the format `form`; an empty text if it is None."""
    return "" if value is None else format(value, form)


def count(value: float | None) -> str:
    """Return a count such as 1.7T; an empty text if it is None."""
    return "" if value is None else format_count(round(value))


def size(value: int | None) -> str:
    """Return a number of bytes in GiB, MiB or KiB; an empty text if it is None."""
    if value is None:
        return ""
    for name, unit in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value} bytes"


def cards(models: Sequence[PhaseChain]) -> str:
    """Return a heading and cards with the main numbers of each model."""
    parts = []
    for model in models:
        shown = "".join(
            f"<div><dt>{name}</dt><dd>{value}<small>{more}</small></dd></div>" for name, value, more in _figures(model)
        )
        parts.append(f'<h2>{escaped(model.name)}</h2><dl class="cards">{shown}</dl>')
    return "\n".join(parts)


def _validation(model: PhaseChain) -> tuple[str, str]:
    """Return the newest validation loss, and a note with the lowest one of the same phase.

    The note names the phase if it is not the last one, because later phases have no validation loss.
    """
    for run in reversed(model.runs):
        known = run.metrics.known("validation_loss")
        if len(known):
            phase = "" if run is model.runs[-1] else f" in {escaped(run.phase)}"
            return number(float(known[-1]), ".4f"), f"lowest {known.min():.4f}{phase}"
    return NONE, "not evaluated"


def _figures(model: PhaseChain) -> Iterable[tuple[str, str, str]]:
    last = model.runs[-1]
    metrics = last.metrics
    goal_tokens, goal_steps = last.setting("run", "tokens"), last.setting("run", "steps")
    step = metrics.last("step")
    of = f"of {goal_steps:,} in {escaped(last.phase)}" if isinstance(goal_steps, int) else ""
    yield "steps", f"{sum(len(run.metrics.steps) for run in model.runs):,}", of or "none recorded yet" * (step is None)
    planned = f" of {format_count(goal_tokens)} planned" if isinstance(goal_tokens, int) and goal_tokens > 0 else ""
    here = f"{count(last.tokens)}{planned} in {escaped(last.phase)}"
    yield "tokens", count(sum(run.tokens for run in model.runs)), here
    losses = metrics.known("loss").tolist()
    averaged = min(len(losses), LAST_STEPS)
    more = f"mean of the last {averaged} steps" if averaged > 1 else ""
    yield "training loss", number(final_loss(losses), ".4f") or NONE, more
    yield "validation loss", *_validation(model)
    speeds = metrics.known("tokens_per_second").tolist()
    mfu = metrics.last("mfu")
    yield (
        "tokens/s",
        count(statistics.median(speeds)) if speeds else NONE,
        "median" + (f", MFU {mfu:.1%}" if mfu else ""),
    )
    again = sum(len(run.restarts) for run in model.runs)
    rolled = sum(run.rolled_back_lines for run in model.runs)
    yield "restarts", f"{again:,}", f"{rolled:,} steps trained again" if rolled else ""
    bad = sum(len({*run.metrics.bad_steps, *run.bad_steps}) for run in model.runs)
    yield from _costs(model)
    yield "bad steps", f"{bad:,}", "marked in the curves" if bad else ""


def _costs(model: PhaseChain) -> Iterable[tuple[str, str, str]]:
    """Yield cards (name, value, note) of the model's size, the time of its training, and the code that trained it."""
    last = model.runs[-1]
    parameters, _, shape = long_name(last.setting("run", "size"), last.groups.get("model")).partition(" parameters, ")
    yield "parameters", escaped(parameters) or NONE, escaped(shape)
    hours = [own["hours"][-1] for own in model.axes() if "hours" in own and len(own["hours"])]
    if hours:
        used = facts.device_hours(model)
        text = "" if used is None else f"{used:.3g} device-hours"
        yield "time in steps", duration(float(hours[-1]) * SECONDS_AN_HOUR), text
    code = facts.commits(model)
    if code:
        yield (
            "commit",
            f"<code>{escaped(code[-1])}</code>",
            f"and {len(code) - 1} before it" if len(code) > 1 else "",
        )


def comparison(compared: Comparison | str | None) -> str:
    """Return the verdict and the checks of a comparison, or the reason (str) why there is none; empty for None."""
    if compared is None:
        return ""
    if isinstance(compared, str):
        return f'<h2>Comparison</h2><p class="soft">No verdict: {escaped(compared)}</p>'
    checks, failed = compared.checks, compared.failed
    parts = [f"{len(failed)} of {len(checks)} checks failed." if failed else VERDICTS[compared.verdict]]
    parts += [f"{len(checks)} checks passed."] if checks and not failed else []
    parts += [f"Updates left out: {escaped(compared.left_out)}."] if compared.left_out else []
    parts += [f"Steps without a partner: {escaped(compared.without_partner)}."] if compared.without_partner else []
    verdict = f'<span class="verdict {"bad" if failed else "good"}">{compared.verdict}</span>'
    heads = ("Pair", "Phase", "Shared", "", "What was compared, or what differs")
    differs = table("What differs", heads, [_check(one) for one in failed]) if failed else ""
    proof = table("What was compared", heads, [_check(one) for one in checks], quiet=True)
    details = f'<details id="checks"><summary>All checks</summary>{proof}</details>' if checks else ""
    return f"<h2>Comparison</h2><p>{verdict}{' '.join(parts)}</p>{differs}{details}"


def _check(check: Check) -> Sequence[str]:
    passed = '<span class="good">yes</span>' if check.passed else '<b class="bad">no</b>'
    return escaped(check.pair), escaped(check.phase or "all"), escaped(check.name), passed, escaped(check.detail)


def data(models: Sequence[PhaseChain]) -> str:
    """Return the table of tokens read, by dataset and source."""
    parts = ["<h2>Data consumed</h2>"]
    heads = ("Source", "Share", "", "Tokens", "Epochs")
    for model in models:
        rows = []
        for one in facts.consumed(model.runs):
            rows.append(_consumed(one, f"<code>{escaped(one.name)}</code>"))
            rows += [_consumed(inner, f"&emsp;{escaped(inner.name)}") for inner in one.inner[:MOST_ROWS]]
        name = escaped(model.name)
        parts.append(table(f"Data of {name}", heads, rows, (1, 3, 4), none=f"{name}: data.mixture is not set."))
        order = ", ".join(str(run.order["fingerprint"])[:16] for run in model.runs if run.order.get("fingerprint"))
        parts.append(_soft(f"Order of data: {escaped(order) or 'not recorded yet'}."))
    shares = "Shares are those of the configuration; within a dataset, those of its sources."
    return "\n".join([*parts, _soft(f"{shares} <code>ettin order</code> counts exactly.")])


def _consumed(one: facts.Consumed, name: str) -> tuple[str, ...]:
    share = one.share
    meter = (
        f'<meter min=0 max=1 value="{share:.4f}" aria-label="share">{share:.0%}</meter>' if share is not None else ""
    )
    return name, number(share, ".1%") or "not known", meter, count(one.tokens), number(one.epochs, ".3g")


def layout(models: Sequence[PhaseChain]) -> str:
    """Return the table with the layout of each phase."""
    heads = ("Model", "Phase", "Layout", "Ranks", "Micro-batch", "Precision", "Device", "Attention", "Engine")
    rows = []
    for model, phase, run in _runs(models):
        last = run.launches[-1] if run.launches else {}
        degrees = {axis: run.setting("parallel", axis) for axis in AXES}
        configured = [f"{axis} {size}" for axis, size in degrees.items() if isinstance(size, int) and size > 1]
        shown = (
            (last.get("layout") or " ".join(configured) or "data-parallel"), last.get("world", ""),
            run.setting("batch", "micro_batch_rows"), run.setting("precision", "name"), facts.used(run, "device"),
            facts.used(run, "attention"), run.setting("parallel", "engine"),
        )  # fmt: skip
        rows.append((model, phase, *map(escaped, shown)))
    return "<h2>Layout</h2>" + table("Layout of each phase", heads, rows, (3, 4), quiet=True)


# keys of a launch's record that are not shown
_NOT_SHOWN = ("model_of_weights", "init_from_relative")
# key of a launch's record -> its column; all other keys share the last column
_LAUNCH = {
    "time": "Time",
    "step": "After step",
    "from": "From",
    "layout": "Layout",
    "world": "Ranks",
    "changes": "Changes",
}


def environment(models: Sequence[PhaseChain]) -> str:
    """Return the table of launches with their software, notes on unreadable lines and slow hosts, and the hosts."""
    rows, notes = [], []
    for model, phase, run in _runs(models):
        for launch in run.launches[-MOST_ROWS:]:
            hidden = {*_NOT_SHOWN, *_LAUNCH, *(("init_from",) if launch.get("from") else ())}
            others = [key for key, value in launch.items() if key not in hidden and value is not None]
            time, *cells = (escaped(_plain(launch.get(key)), key) for key in _LAUNCH)
            cells.append(", ".join(f"{escaped(key)} {escaped(_plain(launch[key]), key)}" for key in others))
            # this class lets the text break anywhere, so that a long path does not push other cells off the page
            wrapped = (f"<span class=any>{cell}</span>" for cell in cells)
            rows.append([model, phase, time.replace("T", " ", 1), *wrapped])
        unreadable, hosts = run.metrics.unreadable_lines, run.metrics.slowest_hosts
        if len(run.launches) > MOST_ROWS:
            notes.append(_soft(f"{model}, {phase}: the last {MOST_ROWS} of {len(run.launches):,} launches."))
        if unreadable:
            text = f"{model}, {phase}: {unreadable:,} lines of metrics.jsonl could not be read."
            notes.append(f'<p class="bad">{text}</p>')
        if len(hosts) > 1:
            (host, often), whole = hosts.most_common(1)[0], hosts.total()
            text = f"the slowest rank was on {escaped(host)} in {often:,} of {whole:,} comparisons."
            notes.append(_soft(f"{model}, {phase}: {text}"))
    launches = table(
        "Launches", ("Model", "Phase", *_LAUNCH.values(), "With"), rows, quiet=True, none="No launch is recorded yet."
    )
    known = list(dict.fromkeys(host for *_, run in _runs(models) for host in facts.hosts(run)))[:MOST_ROWS]
    notes.append(_soft(f"Hosts: {escaped(', '.join(known)) or 'not recorded'}."))
    return "\n".join(["<h2>Environment and launches</h2>", launches, *notes])


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "" if value is None else str(value)


def bad_steps(models: Sequence[PhaseChain]) -> str:
    """Return the table of bad steps, with their reasons and documents; an empty text if there is none."""
    rows = []
    for model, phase, run in _runs(models):
        for step in sorted({*run.metrics.bad_steps, *run.bad_steps}):
            entry = run.bad_steps.get(step, {})
            why = run.metrics.bad_steps.get(step) or f"{entry.get('outcome')}: {entry.get('why')}"
            rows.append((model, phase, f"{step:,}", escaped(why), escaped(entry.get("documents") or "")))
    if not rows:
        return ""
    more = _soft(f"The first {MOST_ROWS} of {len(rows):,}.") if len(rows) > MOST_ROWS else ""
    heads = ("Model", "Phase", "Step", "What was wrong, what was done", "Documents")
    return "<h2>Bad steps</h2>" + table("Steps with bad figures", heads, rows[:MOST_ROWS], (2,), quiet=True) + more


def checkpoints(models: Sequence[PhaseChain], releases: Sequence[Path]) -> str:
    """Return the table of checkpoints and milestones: integrity, and parity of exports (also those in `releases`)."""
    exports = facts.exported(models, releases)
    rows = []
    for model, phase, run in _runs(models):
        rows += [(model, phase, type_, *_checkpoint(path, exports)) for type_, path in facts.saved_paths(run)]
    heads = ("Model", "Phase", "Kind", "Name", "Step", "Tokens", "Size", "Integrity", "Parity with transformers")
    saved = table("Checkpoints and milestones", heads, rows, (4, 5, 6), quiet=True, none="None yet.")
    note = _soft("Sizes are compared; <code>ettin inspect RUN --verify</code> reads every byte.") if rows else ""
    return f"<h2>Checkpoints and milestones</h2>{saved}{note}"


def _checkpoint(path: Path, exports: dict[str, tuple[Path, str]]) -> Sequence[str]:
    try:
        progress = read_progress(path)
    except UserError:
        progress = {}
    step, tokens = (progress.get(key) if isinstance(progress.get(key), int) else None for key in ("step", "tokens"))
    whole, detail, size_bytes = facts.integrity_of(path)
    tone, word = ("good", "whole") if whole else ("bad", "damaged")
    state = f'<span class="{tone}">{word}</span>: {escaped(detail)}'
    name, parity = f"<code class=whole>{escaped(path.name)}</code>", escaped(facts.parity_of(path, exports))
    return name, number(step), count(tokens), size(size_bytes), state, parity


def configuration(models: Sequence[PhaseChain]) -> str:
    """Return the configuration of each phase, in collapsed elements."""
    parts = ["<h2>Configuration</h2>"]
    for index, (model, phase, run) in enumerate(_runs(models)):
        rows = [
            (f"<code>{escaped(f'{group}.{key}')}</code>", f"<code>{escaped(value, str(key))}</code>")
            for group, settings in run.groups.items()
            for key, value in (settings.items() if isinstance(settings, dict) else [("", settings)])
        ]
        keys = table(f"Configuration of {model}, {phase}", ("Key", "Value"), rows, quiet=True)
        summary = f"<summary>{model}, {phase}: <code>{escaped(run.path)}</code></summary>"
        parts.append(f'<details id="config-{index}">{summary}{keys}</details>')
    return "\n".join(parts)


def _soft(text: str) -> str:
    return f'<p class="soft">{text}</p>'


def _runs(models: Sequence[PhaseChain]) -> list[tuple[str, str, RunDirectory]]:
    """Return (model name as HTML, phase as HTML, run directory) of every run."""
    return [(escaped(model.name), escaped(run.phase), run) for model in models for run in model.runs]
