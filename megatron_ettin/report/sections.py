"""Write the parts of a run's page that are words and tables; all text of files goes through `escaped`."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_ettin.base.text import duration, format_count
from megatron_ettin.config.tables import long_name
from megatron_ettin.report import facts
from megatron_ettin.report.compare import Check, Comparison
from megatron_ettin.report.facts import escaped
from megatron_ettin.report.models import SECONDS_AN_HOUR, ModelRuns
from megatron_ettin.report.record import LAST_STEPS, RunRecord, final_loss

NONE = "none"
# rows of a table of launches or bad steps
MOST_ROWS = 200
VERDICTS = {
    "PAIRED": "Same shape, data order, schedule, optimizer and batch; same rows, tokens and updates at every common"
    " step. Losses of two objectives share an axis here, not a meaning: compare the shapes, not the heights.",
    "SAME TRAINING": "Everything that shapes the result is the same, the objective too.",
    "ONE MODEL": "There is nothing to compare it with.",
}
AXES = ("tp", "pp", "vpp", "cp")


def table(
    caption: str, heads: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = (), quiet: bool = False
) -> str:
    """Return a table. Cells are HTML.

    Args:
        caption: its caption, as HTML.
        heads: of the columns.
        rows: cells of each row.
        numbers: columns that align to the right.
        quiet: whether a heading above has the caption's text.
    """
    classes = [" class=number" if column in numbers else "" for column in range(len(heads))]
    head = "".join(f"<th scope=col{one}>{name}</th>" for one, name in zip(classes, heads))
    body = "\n".join(
        "<tr>" + "".join(f"<td{one}>{cell}</td>" for one, cell in zip(classes, row)) + "</tr>" for row in rows
    )
    text = f"<caption{' class=sr' * quiet}>{caption}</caption>"
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{caption}"><table>{text}'
        f"<thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>"
    )


def number(value: float | None, form: str = ",") -> str:
    return "" if value is None else format(value, form)


def count(value: float | None) -> str:
    return "" if value is None else format_count(round(value))


def size(value: int | None) -> str:
    if value is None:
        return ""
    unit, name = next(
        ((unit, name) for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")) if value >= unit), (1, "bytes")
    )
    return f"{value / unit:.3g} {name}" if unit > 1 else f"{value} bytes"


def cards(models: Sequence[ModelRuns]) -> str:
    """Return the figures of each model at a glance."""
    parts = []
    for model in models:
        shown = "".join(
            f"<div><dt>{name}</dt><dd>{value}<small>{more}</small></dd></div>" for name, value, more in _figures(model)
        )
        parts.append(f'<h2>{escaped(model.name)}</h2><dl class="cards">{shown}</dl>')
    return "\n".join(parts)


def _validation(model: ModelRuns) -> tuple[str, str]:
    """Return the newest loss on held-out data and the lowest of its phase, named where a later one has none."""
    for run in reversed(model.runs):
        known = run.metrics.known("validation_loss")
        if len(known):
            phase = "" if run is model.runs[-1] else f" in {escaped(run.named('phase'))}"
            return number(float(known[-1]), ".4f"), f"lowest {known.min():.4f}{phase}"
    return NONE, "not evaluated"


def _figures(model: ModelRuns) -> Iterable[tuple[str, str, str]]:
    last = model.runs[-1]
    metrics = last.metrics
    goal_tokens, goal_steps = last.setting("run", "tokens"), last.setting("run", "steps")
    step = metrics.last("step")
    of = f"of {goal_steps:,} in {escaped(last.named('phase'))}" if isinstance(goal_steps, int) else ""
    yield "steps", f"{sum(len(run.metrics.steps) for run in model.runs):,}", of or "none recorded yet" * (step is None)
    planned = f" of {format_count(goal_tokens)} planned" if isinstance(goal_tokens, int) and goal_tokens > 0 else ""
    here = f"{count(last.tokens)}{planned} in {escaped(last.named('phase'))}"
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


def _costs(model: ModelRuns) -> Iterable[tuple[str, str, str]]:
    """Yield the model's size, the cost of its training, and the code that trained it."""
    last = model.runs[-1]
    parameters, _, shape = long_name(last.setting("run", "size"), last.config.get("model")).partition(" parameters, ")
    yield "parameters", escaped(parameters) or NONE, escaped(shape)
    hours = [own["hours"][-1] for own in model.axes() if "hours" in own and len(own["hours"])]
    if hours:
        used = facts.device_hours(model)
        text = "" if used is None else f"{used:.3g} device-hours"
        yield "time in steps", duration(float(hours[-1]) * SECONDS_AN_HOUR), text
    found = facts.commits(model)
    if found:
        yield (
            "commit",
            f"<code>{escaped(found[-1])}</code>",
            f"and {len(found) - 1} before it" if len(found) > 1 else "",
        )


def comparison(compared: Comparison | str | None) -> str:
    """Return the verdict and the checks of `ettin compare`, or the reason why there is no verdict."""
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
    differs = table("What differs", heads, map(_check, failed)) if failed else ""
    proof = table("What was compared", heads, map(_check, checks), quiet=True)
    details = f'<details id="checks"><summary>All checks</summary>{proof}</details>' if checks else ""
    return f"<h2>Comparison</h2><p>{verdict}{' '.join(parts)}</p>{differs}{details}"


def _check(check: Check) -> Sequence[str]:
    passed = '<span class="good">yes</span>' if check.passed else '<b class="bad">no</b>'
    return escaped(check.pair), escaped(check.phase or "all"), escaped(check.name), passed, escaped(check.detail)


def data(models: Sequence[ModelRuns]) -> str:
    parts = ["<h2>Data consumed</h2>"]
    for model in models:
        rows = []
        for one in facts.consumed(model.runs):
            rows.append(_consumed(one, f"<code>{escaped(one.name)}</code>"))
            rows += [_consumed(inner, f"&emsp;{escaped(inner.name)}") for inner in one.inner[:MOST_ROWS]]
        heads = ("Source", "Share", "", "Tokens", "Epochs")
        text = table(f"Data of {escaped(model.name)}", heads, rows, (1, 3, 4))
        parts.append(text if rows else f'<p class="soft">{escaped(model.name)}: data.mixture is not set.</p>')
        order = ", ".join(str(run.order["fingerprint"])[:16] for run in model.runs if run.order.get("fingerprint"))
        parts.append(f'<p class="soft">Order of data: {escaped(order) or "not recorded yet"}.</p>')
    note = (
        "Shares are those of the configuration; within a dataset, those of its sources."
        " <code>ettin order</code> counts exactly."
    )
    return "\n".join([*parts, f'<p class="soft">{note}</p>'])


def _consumed(one: facts.Consumed, name: str) -> tuple[str, ...]:
    meter = (
        ""
        if one.share is None
        else f'<meter min=0 max=1 value="{one.share:.4f}" aria-label="share">{one.share:.0%}</meter>'
    )
    return name, number(one.share, ".1%") or "not known", meter, count(one.tokens), number(one.epochs, ".3g")


def layout(models: Sequence[ModelRuns]) -> str:
    heads = ("Model", "Phase", "Layout", "Ranks", "Micro-batch", "Precision", "Device", "Attention", "Engine")
    rows = []
    for model, run in _runs(models):
        last = run.launches[-1] if run.launches else {}
        degrees = {axis: run.setting("parallel", axis) for axis in AXES}
        configured = " ".join(
            f"{axis} {degree}" for axis, degree in degrees.items() if isinstance(degree, int) and degree > 1
        )
        shown = (
            (last.get("layout") or configured or "data-parallel"), last.get("world", ""),
            run.setting("batch", "micro_batch_rows"), run.setting("precision", "name"), facts.used(run, "device"),
            facts.used(run, "attention"), run.setting("parallel", "engine"),
        )  # fmt: skip
        rows.append((escaped(model.name), escaped(run.named("phase")), *map(escaped, shown)))
    return "<h2>Layout</h2>" + table("Layout of each phase", heads, rows, (3, 4), quiet=True)


def environment(models: Sequence[ModelRuns]) -> str:
    """Return the launches, each with the software it ran on, and the hosts that are known."""
    shown = [(model, run, launch) for model, run in _runs(models) for launch in run.launches[-MOST_ROWS:]]
    rows = [
        [
            *(escaped(model.name), escaped(run.named("phase"))),
            escaped(_plain(launch.get("time")).replace("T", " ", 1)),
            *(_wrapped(escaped(_plain(launch.get(key)), key)) for key in list(_LAUNCH)[1:]),
            _wrapped(", ".join(f"{escaped(key)} {escaped(_plain(launch[key]), key)}" for key in _others(launch))),
        ]
        for model, run, launch in shown
    ]
    heads = ("Model", "Phase", *_LAUNCH.values(), "With")
    parts = ["<h2>Environment and launches</h2>"]
    parts.append(
        table("Launches", heads, rows, quiet=True) if rows else '<p class="soft">No launch is recorded yet.</p>'
    )
    for model, run in _runs(models):
        what = f"{escaped(model.name)}, {escaped(run.named('phase'))}"
        if len(run.launches) > MOST_ROWS:
            parts.append(f'<p class="soft">{what}: the last {MOST_ROWS} of {len(run.launches):,} launches.</p>')
        if run.metrics.unreadable_lines:
            unread = f"{run.metrics.unreadable_lines:,} lines of metrics.jsonl could not be read"
            parts.append(f'<p class="bad">{what}: {unread}.</p>')
        if len(run.metrics.slowest_hosts) > 1:
            (host, often), whole = run.metrics.slowest_hosts.most_common(1)[0], run.metrics.slowest_hosts.total()
            text = f"the slowest rank was on {escaped(host)} in {often:,} of {whole:,} comparisons"
            parts.append(f'<p class="soft">{what}: {text}.</p>')
    named = dict.fromkeys(host for _, run in _runs(models) for host in facts.hosts(run))
    parts.append(f'<p class="soft">Hosts: {escaped(", ".join(list(named)[:MOST_ROWS])) or "not recorded"}.</p>')
    return "\n".join(parts)


_NOT_SHOWN = ("model_of_weights", "init_from_relative")
# keys of a launch's record with a column of their own; the others share one
_LAUNCH = {
    "time": "Time",
    "step": "After step",
    "from": "From",
    "layout": "Layout",
    "world": "Ranks",
    "changes": "Changes",
}


def _others(launch: dict[str, Any]) -> list[str]:
    hidden = {*_NOT_SHOWN, *_LAUNCH, *(("init_from",) if launch.get("from") else ())}
    return [key for key, value in launch.items() if key not in hidden and value is not None]


def _wrapped(text: str) -> str:
    """Return a cell that breaks anywhere, so that a long path does not push others off the page."""
    return f"<span class=any>{text}</span>"


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "" if value is None else str(value)


def bad_steps(models: Sequence[ModelRuns]) -> str:
    rows = []
    for model, run in _runs(models):
        for step in sorted({*run.metrics.bad_steps, *run.bad_steps}):
            entry = run.bad_steps.get(step, {})
            why = run.metrics.bad_steps.get(step) or f"{entry.get('outcome')}: {entry.get('why')}"
            rows.append(
                (
                    escaped(model.name),
                    escaped(run.named("phase")),
                    f"{step:,}",
                    escaped(why),
                    escaped(entry.get("documents") or ""),
                )
            )
    if not rows:
        return ""
    more = f'<p class="soft">The first {MOST_ROWS} of {len(rows):,}.</p>' if len(rows) > MOST_ROWS else ""
    heads = ("Model", "Phase", "Step", "What was wrong, what was done", "Documents")
    return "<h2>Bad steps</h2>" + table("Steps with bad figures", heads, rows[:MOST_ROWS], (2,), quiet=True) + more


def checkpoints(models: Sequence[ModelRuns], releases: Sequence[Path]) -> str:
    exports = facts.exported(models, releases)
    rows = []
    for model, run in _runs(models):
        for one in facts.saved(run, exports):
            tone, word = ("good", "whole") if one.whole else ("bad", "damaged")
            state = f'<span class="{tone}">{word}</span>: {escaped(one.integrity)}'
            names = (
                escaped(model.name),
                escaped(run.named("phase")),
                one.type,
                f"<code class=whole>{escaped(one.path.name)}</code>",
            )
            rows.append(
                (
                    *names,
                    number(one.step),
                    count(one.tokens),
                    size(one.bytes),
                    state,
                    escaped(one.parity or "no export found"),
                )
            )
    heads = ("Model", "Phase", "Kind", "Name", "Step", "Tokens", "Size", "Integrity", "Parity with transformers")
    text = (
        table("Checkpoints and milestones", heads, rows, (4, 5, 6), quiet=True)
        if rows
        else '<p class="soft">None yet.</p>'
    )
    note = (
        '<p class="soft">Sizes are compared; <code>ettin inspect RUN --verify</code> reads every byte.</p>'
        if rows
        else ""
    )
    return f"<h2>Checkpoints and milestones</h2>{text}{note}"


def configuration(models: Sequence[ModelRuns]) -> str:
    parts = ["<h2>Configuration</h2>"]
    for index, (model, run) in enumerate(_runs(models)):
        rows = [
            (f"<code>{escaped(f'{group}.{key}')}</code>", f"<code>{escaped(value, str(key))}</code>")
            for group, settings in run.config.items()
            for key, value in (settings.items() if isinstance(settings, dict) else [("", settings)])
        ]
        what = f"{escaped(model.name)}, {escaped(run.named('phase'))}"
        text = table(f"Configuration of {what}", ("Key", "Value"), rows, quiet=True)
        parts.append(
            f'<details id="config-{index}"><summary>{what}: <code>{escaped(run.path)}</code></summary>{text}</details>'
        )
    return "\n".join(parts)


def _runs(models: Sequence[ModelRuns]) -> list[tuple[ModelRuns, RunRecord]]:
    return [(model, run) for model in models for run in model.runs]
