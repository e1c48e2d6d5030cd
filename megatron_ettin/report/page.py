"""The comparison as one page: verdict, curves, the proof check by check, the runs. Everything is inside the file
(no script, no font, no network), so it can be mailed, archived beside the run and opened in ten years."""

from __future__ import annotations

import html
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_ettin.base.files import write_atomically
from megatron_ettin.base.text import format_count
from megatron_ettin.config.tables import long_name
from megatron_ettin.report.compare import Chain, Check, Comparison, Run, chains, operations
from megatron_ettin.report.curves import Chart, Curve, colour_places, png, svg

# key of metrics.jsonl -> (title, unit)
CHARTS = {
    "loss": ("Training loss", "nats"),
    "validation_loss": ("Validation loss", "nats"),
    "lr": ("Learning rate", "lr"),
    "grad_norm": ("Gradient norm", "norm"),
    "tokens_per_second": ("Tokens per second", "tokens/s"),
}
LAST_STEPS = 20  # over which the final loss is the mean
STYLE = """
:root{color-scheme:light dark;--ink:#1c2024;--soft:#60646c;--paper:#fff;--card:#f7f8fa;--rule:#dfe2e7;
--good:#18794e;--bad:#c62a2f;--c0:#2563c9;--c1:#d9480f;--c2:#2b8a3e;--c3:#9c36b5;--c4:#b08900;--c5:#0b7285}
@media (prefers-color-scheme:dark){:root{--ink:#e6e8eb;--soft:#9ba1a6;--paper:#15181b;--card:#1d2125;--rule:#343a40;
--good:#4cc38a;--bad:#ff8b8e;--c0:#6ea8fe;--c1:#ff9f5a;--c2:#69db7c;--c3:#da9cf2;--c4:#ffd43b;--c5:#66d9e8}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1080px;padding:28px 20px 60px;background:var(--paper);color:var(--ink);
font:15px/1.5 system-ui,sans-serif}
h1{font-size:22px;margin:0 0 4px}h2{font-size:16px;margin:34px 0 10px}p{margin:4px 0}.soft{color:var(--soft)}
.verdict{display:inline-block;font-weight:700;letter-spacing:.03em;padding:3px 12px;border-radius:6px;
border:2px solid currentColor;margin:10px 12px 6px 0}.good{color:var(--good)}.bad{color:var(--bad)}
figure{margin:0;background:var(--card);border:1px solid var(--rule);border-radius:8px;padding:12px 14px 4px;min-width:0}
figcaption{font-weight:600}.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:14px}
.wide{grid-column:1/-1;overflow-x:auto}.wide svg{min-width:640px}
svg{width:100%;height:auto;display:block}svg text{fill:var(--soft);font:12px system-ui,sans-serif}
.grid{stroke:var(--rule)}.axis{stroke:var(--soft)}.mark{stroke:var(--soft);stroke-dasharray:2 4}
.line{fill:none;stroke-width:2;stroke-linejoin:round}.raw{fill:none;stroke-width:1;opacity:.3}
.c0{stroke:var(--c0)}.c1{stroke:var(--c1)}.c2{stroke:var(--c2)}.c3{stroke:var(--c3)}.c4{stroke:var(--c4)}.c5{stroke:var(--c5)}
.f0{fill:var(--c0)}.f1{fill:var(--c1)}.f2{fill:var(--c2)}.f3{fill:var(--c3)}.f4{fill:var(--c4)}.f5{fill:var(--c5)}
details{margin:10px 0}summary{cursor:pointer;font-weight:600}
.key{display:inline-block;width:22px;border-top:3px solid;vertical-align:middle;margin-right:6px}
.key.dashed{border-top-style:dashed}
.legend span.entry{margin-right:18px;white-space:nowrap}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:14px}
th,td{text-align:left;padding:5px 12px 5px 0;border-bottom:1px solid var(--rule);vertical-align:top}
td.number,th.number{text-align:right;font-variant-numeric:tabular-nums}code{font-size:13px;overflow-wrap:anywhere}
"""


def charts(comparison: Comparison) -> list[Chart]:
    """The charts that the runs have numbers for."""
    drawn = []
    for key, (title, unit) in CHARTS.items():
        curves = []
        for colour, chain in zip(colours(comparison), comparison.chains, strict=True):
            segments = chain.segments(key)
            if segments:
                curves.append(Curve(chain.name, colour, segments, dotted=key == "validation_loss"))
        if curves:
            longest = max(comparison.chains, key=lambda chain: len(chain.runs))
            starts = longest.phase_starts()
            drawn.append(Chart(title, unit, curves, starts, wide=key == "loss", clipped=key == "grad_norm"))
    return drawn


def colours(comparison: Comparison) -> list[int]:
    return [place % 6 for place in colour_places([chain.objective for chain in comparison.chains])]


def picture_of(runs: list[Path]) -> bytes:
    """The curves of one model's phases as a PNG. Raises UserError where a run has no metrics."""
    return png(charts(Comparison(chains([Run.read(path) for path in runs]), [])))


def summary(chain: Chain) -> dict[str, Any]:
    """The figures of one model, for the page's table and for --json."""
    steps = [line for run in chain.runs for line in run.steps.values()]
    last = [line["loss"] for line in chain.runs[-1].steps.values() if line.get("loss") is not None][-LAST_STEPS:]
    speeds = [line["tokens_per_second"] for line in steps if line.get("tokens_per_second")]
    return {
        "name": chain.name,
        "model": long_name(chain.runs[-1].config.run.size, chain.runs[-1].config.model),
        "runs": [str(run.path) for run in chain.runs],
        "phases": chain.phases,
        "steps": len(steps),
        "tokens": sum(run.tokens for run in chain.runs),
        "final_loss": statistics.fmean(last) if last else None,
        "tokens_per_second": statistics.median(speeds) if speeds else None,
        "updates_left_out": chain.left_out(),
        **operations(chain.runs[-1]),
    }


def as_json(comparison: Comparison, page: Path, picture: Path) -> dict[str, Any]:
    return {
        "verdict": comparison.verdict,
        "steps_without_partner": comparison.without_partner,
        "models": [summary(chain) for chain in comparison.chains],
        "checks": [vars(check) for check in comparison.checks],
        "page": str(page),
        "picture": str(picture),
    }


def write(comparison: Comparison, out: Path) -> Path:
    """Write the page to `out` and its picture beside it; returns the picture's path."""
    drawn = charts(comparison)
    picture = out.with_suffix(".png")
    out.parent.mkdir(parents=True, exist_ok=True)
    for path, content in ((picture, png(drawn)), (out, render(comparison, drawn).encode())):
        write_atomically(path, content)
    return picture


def render(comparison: Comparison, drawn: Sequence[Chart]) -> str:
    names = html.escape(", ".join(chain.name for chain in comparison.chains))
    figures = "\n".join(
        f'<figure class="{"wide" if chart.wide else ""}"><figcaption>{html.escape(chart.title)}</figcaption>'
        f"{svg(chart)}</figure>"
        for chart in drawn
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>{comparison.verdict}: {names}</title><style>{STYLE}</style></head><body>
<h1>{names}</h1>
{_verdict(comparison)}
<p class="legend">{_legend(comparison)}</p>
<div class="charts">
{figures}
</div>
{_proof(comparison)}
<h2>Runs</h2>
{_runs(comparison)}
</body></html>
"""


def _verdict(comparison: Comparison) -> str:
    failed = comparison.failed
    told = {
        "PAIRED": "Same shape, data order, schedule, optimizer and batch; same rows, tokens and "
        "updates at every common step. "
        "Losses of two objectives share an axis here, not a meaning: compare the shapes, not the heights.",
        "SAME TRAINING": "Everything that shapes the result is the same, the objective too.",
        "ONE MODEL": "Nothing to compare with.",
        "NOT PAIRED": f"{len(failed)} of {len(comparison.checks)} checks failed; the table below names what differs.",
    }[comparison.verdict]
    if comparison.left_out:
        told += f" Updates left out: {comparison.left_out}."
    if comparison.without_partner:
        told += f" Steps without a partner: {comparison.without_partner}."
    tone = "bad" if failed else "good"
    return f'<p><span class="verdict {tone}">{comparison.verdict}</span>{html.escape(told)}</p>'


def _legend(comparison: Comparison) -> str:
    key = '<span class="key{}" style="color:var(--c{})"></span>'
    return "".join(
        f'<span class="entry">{key.format(" dashed" if number else "", colour)}{html.escape(chain.name)}</span>'
        for number, (colour, chain) in enumerate(zip(colours(comparison), comparison.chains, strict=True))
    )


def _proof(comparison: Comparison) -> str:
    if not comparison.checks:
        return ""
    many = len(comparison.chains) > 2
    rows = "\n".join(_proof_row(check, many) for check in comparison.checks)
    pair = "<th>Pair</th>" if many else ""
    heads = f"<tr>{pair}<th>Phase</th><th>Shared</th><th></th><th>What was compared, or what differs</th></tr>"
    failed = "\n".join(_proof_row(check, many) for check in comparison.failed)
    differs = f'<div class="scroll"><table>{heads}\n{failed}</table></div>' if failed else ""
    told = f"All {len(comparison.checks)} checks" + ("" if failed else " passed")
    whole = f'<div class="scroll"><table>{heads}\n{rows}</table></div>'
    return f"<h2>Proof</h2>{differs}<details><summary>{told}</summary>{whole}</details>"


def _proof_row(check: Check, with_pair: bool) -> str:
    pair = f"<td>{html.escape(check.pair)}</td>" if with_pair else ""
    mark = '<td class="good">yes</td>' if check.passed else '<td class="bad"><b>no</b></td>'
    return (
        f"<tr>{pair}<td>{html.escape(check.phase or 'all')}</td><td>{html.escape(check.name)}</td>{mark}"
        f"<td>{html.escape(check.detail)}</td></tr>"
    )


def _runs(comparison: Comparison) -> str:
    heads = "".join(
        f"<th{' class=number' if number else ''}>{name}</th>"
        for name, number in (
            ("Model", False), ("Phases", False), ("Steps", True), ("Tokens", True), (f"Loss, last {LAST_STEPS}", True),
            ("Tokens/s", True), ("Layout", False), ("Micro-batch", True), ("Precision", False),
        )
    )  # fmt: skip
    rows = []
    for chain in comparison.chains:
        figures = summary(chain)
        loss, speed = figures["final_loss"], figures["tokens_per_second"]
        rows.append(
            f"<tr><td>{html.escape(chain.name)}<br>{html.escape(figures['model'])}<br>"
            + "<br>".join(f'<code class="soft">{html.escape(path)}</code>' for path in figures["runs"])
            + f"</td><td>{html.escape(', '.join(chain.phases))}</td><td class=number>{figures['steps']:,}</td>"
            f"<td class=number>{figures['tokens']:,}</td><td class=number>{'' if loss is None else f'{loss:.4f}'}</td>"
            f"<td class=number>{'' if speed is None else format_count(speed)}</td><td>{figures['layout']}</td>"
            f"<td class=number>{figures['micro-batch rows']}</td><td>{html.escape(figures['precision'])}</td></tr>"
        )
    return f'<div class="scroll"><table><tr>{heads}</tr>\n' + "\n".join(rows) + "</table></div>"
