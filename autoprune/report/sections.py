"""The sections of the report as fragments of HTML.

Decides the words and tables of each section. Every value from outside is escaped here. Must not draw: a figure is an
empty element with a name, which the page fills.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from autoprune.cost import COSTS, LATENCY
from autoprune.policy import CHANNEL
from autoprune.prices import CHEAP, DEAR, Curves, Explanation
from autoprune.report import units
from autoprune.report.diagnostics import RungPair, RungTime
from autoprune.report.explanation import number, price_text, sentence, summary, weighted
from autoprune.report.intervals import hypervolume_sentence, reference_sentence
from autoprune.report.view import FrontPoint, SearchView

Chosen = Sequence[tuple[str, FrontPoint]]


def head(view: SearchView, about: Sequence[tuple[str, str]]) -> str:
    """Returns the title, what was found in a sentence, and readable pairs."""
    pairs = "".join(f"<div><dt>{_e(name)}</dt><dd>{_e(value)}</dd></div>" for name, value in about if value)
    return f"<header><h1>{_e(view.name)}</h1><p>{_found(view)}</p><dl class='about'>{pairs}</dl></header>"


def navigation(names: Sequence[str]) -> str:
    """Returns links to the sections."""
    return "<nav>" + "".join(f"<a href='#{_anchor(name)}'>{_e(name)}</a>" for name in names) + "</nav>"


def front(view: SearchView) -> str:
    """Returns the figure and the tables of the front and of the controls."""
    if not view.front:
        text = f"No trial of the rung {_e(view.rung)} has finished yet."
        return _section("Front", f"<p>{text}</p>{_figure('figure-front')}")
    tested = any(p.test_accuracy is not None for p in (view.dense, *view.front, *view.controls))
    heads = ["trial", *_score_heads(view, tested=tested), *(units.LABELS[c] for c in view.costs)]
    heads += [_measured_head(view)] if _has_latency(view) else []
    heads += ["criterion", "proposed by"]
    rows = [_front_row(view, view.dense, tested=tested)]
    rows += [_front_row(view, point, tested=tested) for point in reversed(view.front)]
    body = _figure("figure-front") + _table(heads, rows)
    body += f"<p class='note'>{_e(view.caveat)}</p>" if view.caveat else ""
    body += f"<p class='note'>{_margins(view)}{_closing(view)}</p>"
    body += "".join(f"<p class='{'warning' if n.startswith('Warning') else 'note'}'>{_e(n)}</p>" for n in view.notes)
    if view.controls:
        body += "<h3>Controls: simple policies under the same recipe</h3>" + _controls(view, tested=tested)
    return _section("Front", body)


def chosen(view: SearchView, points: Chosen) -> str:
    """Returns the points that a person would look at first, and what each group keeps in them."""
    cards = "".join(_card(view, what, point) for what, point in points)
    heads = ["group", "dense", *(f"trial {p.name}: {what}" for what, p in points)]
    rows = []
    for group, size in view.sizes.items():
        cells = [_name(group), str(size), *(_kept(p.widths.get(group, size), size) for _, p in points)]
        rows.append(_row(cells))
    return _section("Chosen points", f"<div class='cards'>{cards}</div>{_table(heads, rows)}")


def why(points: Chosen, explanations: Mapping[int, Explanation], unexplained: Mapping[int, str]) -> str:
    """Returns for each chosen point why its groups have their widths, or why nobody can tell."""
    if not explanations:
        reasons = list(dict.fromkeys(unexplained.values())) or ["No trial can be explained."]
        return _section("Why these widths", "".join(f"<p class='note'>{_e(reason)}</p>" for reason in reasons))
    label = units.LABELS[next(iter(explanations.values())).cost]
    parts = [
        "<p class='note'>The error of a group is the part of its consumers' output that refitting cannot bring back. A"
        f" price is the error added for each percent of the dense network's {_e(label)} saved by one step"
        " down, or taken away for each percent spent by one step up. Groups share layers, so their parts add up to more"
        " than 100%.</p>"
    ]
    shown = next((what for what, _ in points if "knee" in what), points[-1][0])
    for what, point in points:
        title = f"Trial {_e(point.name)}: {_e(what)}"
        found = explanations.get(point.trial) if point.trial is not None else None
        if found is None:
            reason = unexplained.get(point.trial, "") if point.trial is not None else ""
            parts.append(f"<p class='note'>{title} cannot be explained. {_e(reason)}</p>")
            continue
        text = "".join(f"<p>{_e(line)}</p>" for line in summary(found))
        state = " open" if what == shown else ""
        parts.append(f"<details{state}><summary>{title}</summary>{text}{_prices(found)}</details>")
    return _section("Why these widths", "".join(parts))


def widths(view: SearchView) -> str:
    """Returns the heat map's place."""
    text = "What each point of the front keeps of every pruning group: a row a group, a column a point."
    return _section("Widths", f"<p class='note'>{text}</p>{_figure('figure-widths')}")


def sensitivity(curves: Curves, view: SearchView, missing: str) -> str:
    """Returns the place of the sensitivity curves, or why there are none."""
    if not curves:
        return _section("Sensitivity", f"<p class='note'>{_e(missing or 'No error tables are stored.')}</p>")
    marked = view.knee or (view.front[-1] if view.front else None)
    marks = f" The marks are the widths of trial {_e(marked.name)}." if marked is not None else ""
    refitted = "after its consumers are refitted" if view.pruning == CHANNEL else "after the others are refitted"
    text = f"What each pruning group loses as its {view.unit} go, {refitted}, without fine-tuning."
    text += (
        f" Lines run from the network's first groups (green) to its last (pink).{marks} At full width nothing is lost."
    )
    return _section("Sensitivity", f"<p class='note'>{text}</p>{_figure('figure-sensitivity')}")


def latency(view: SearchView, *, drawn: bool) -> str:
    """Returns the place of the latency figure, or that nothing was measured."""
    if not drawn:
        text = "No latency was measured: only fine-tuned and tested trials are timed."
        return _section("Latency", f"<p class='note'>{text}</p>")
    dense = view.dense.metrics.get("latency_ms")
    text = f"The dense network takes {units.milliseconds(dense)} for one call. " if dense is not None else ""
    text += "Each mark is the median of repeated calls, its bar their spread."
    if not any("latency_predicted_ms" in p.metrics for p in view.trials):
        text += " This search predicted no latencies, so they are shown against the cost."
    return _section("Latency", f"<p class='note'>{text}</p>{_figure('figure-latency')}")


def audit(pairs: Sequence[RungPair], figures: Mapping[str, Any]) -> str:
    """Returns how well each rung ranks what the next one measured."""
    heads = ["rungs", "policies", "Kendall τ", "regret"]
    rows, warnings = [], []
    for pair in pairs:
        tau = "–" if pair.tau is None else f"{pair.tau:.2f}"
        regret = "–" if pair.regret is None else pair.objective.regret(pair.regret)
        rows.append(_row([f"{_e(pair.first)} → {_e(pair.second)}", str(len(pair.points)), tau, regret]))
        if pair.warning:
            warnings.append(f"<p class='warning'>{_e(f'{pair.first} → {pair.second}: {pair.warning}')}</p>")
    names = [f"figure-audit-{i}" for i in range(len(pairs))]
    drawn = "".join(f"<div>{_figure(name)}</div>" for name in names if figures.get(name) is not None)
    text = "How well a cheap rung ranks what the next one measures. Regret: how much worse the first rung's favourite"
    text += " is than the best that the second one found."
    body = f"<p class='note'>{text}</p>{_table(heads, rows)}{''.join(warnings)}<div class='figures'>{drawn}</div>"
    return _section("Proxy audit", body)


def time(times: Sequence[RungTime], *, drawn: bool) -> str:
    """Returns where the time went."""
    heads = ["rung", "evaluations", "failed", "time of evaluations", "each", "first start to last end"]
    rows = []
    for spent in times:
        total = sum(spent.seconds.values())
        each = f"{total / spent.trials:.3g} s" if spent.trials and total else "–"
        span = "–" if spent.span is None else units.seconds(spent.span)
        cells = [_e(spent.rung), str(spent.trials), str(spent.failed), units.seconds(total), each, span]
        rows.append(_row(cells))
    body = (_figure("figure-time") if drawn else "") + _table(heads, rows)
    return _section("Time", body)


def failures(rows: Sequence[tuple[str, int, str, str]]) -> str:
    """Returns the trials that failed, with their reasons."""
    if not rows:
        return _section("Failures", "<p class='note'>No trial failed.</p>")
    lines = [
        f"<tr><td>{_e(rung)}</td><td>{trial}</td><td>{_e(source)}</td><td class='wrap'>{_e(reason)}</td></tr>"
        for rung, trial, source, reason in rows
    ]
    return _section("Failures", _table(["rung", "trial", "proposed by", "reason"], lines))


def reproduce(commands: Sequence[tuple[str, str]], settings: str, policies: Mapping[int, str], missing: str) -> str:
    """Returns the commands that make this search again, the policies' ids and the exact settings."""
    length = max((len(command) for command, _ in commands), default=0)
    text = "\n".join(f"{command:<{length}}  # {what}" for command, what in commands)
    body = f"<pre><code>{_e(text)}</code></pre>" if commands else ""
    if policies:
        known = ", ".join(f"trial {trial}: <code>{_e(policy)}</code>" for trial, policy in policies.items())
        body += f"<p class='note'>Ids of the chosen points' policies: {known}.</p>"
    if settings:
        body += f"<details><summary>space.yaml: the settings as they were run</summary><pre><code>{_e(settings)}</code>"
        body += "</pre></details>"
    elif missing:
        body += f"<p class='note'>{_e(missing)}</p>"
    return _section("Reproduce", body)


# --- parts of sections ---


def _found(view: SearchView) -> str:
    points = view.front
    if not points:
        return f"No trial of the rung {_e(view.rung)} has finished yet."
    label, best, own = units.LABELS[view.primary], points[-1], view.objective
    text = f"{len(points)} of {len(view.trials)} trials of the rung {_e(view.rung)} are on the front. "
    text += f"The {_e(own.best)} (trial {_e(best.name)}) reaches {own.text(best.val_accuracy)} on the validation"
    text += f" split at {units.share(view.fraction(best))} of the dense network's {label}; the dense network"
    text += f" reaches {own.text(view.dense.val_accuracy)}."
    if view.knee is not None:
        knee = view.knee
        text += f" The knee (trial {_e(knee.name)}) has {own.text(knee.val_accuracy)} at"
        text += f" {units.share(view.fraction(knee))}."
    return f"{text} {_e(own.note)}".rstrip()


def _front_row(view: SearchView, point: FrontPoint, *, tested: bool) -> str:
    dense = point is view.dense
    cells = ["dense" if dense else _e(point.name), view.objective.text(point.val_accuracy)]
    cells += [_tested(view, point)] if tested else []
    cells += [_cost(view, point, cost) for cost in view.costs]
    cells += [_measured(view, point)] if _has_latency(view) else []
    cells += ["", ""] if dense else [_e(point.criterion), _e(point.origin)]
    knee = view.knee
    return _row(cells, mark="knee" if knee is not None and point is knee else "")


def _controls(view: SearchView, *, tested: bool) -> str:
    heads = ["control", *_score_heads(view, tested=tested), *(units.LABELS[c] for c in view.costs)]
    heads.append("front gains")
    rows = []
    for point in sorted(view.controls, key=lambda p: -p.costs[view.primary]):
        gain = view.gain(point)
        said = "–" if gain is None else _gain(view, point, gain)
        cells = [_e(point.origin or point.name), view.objective.text(point.val_accuracy)]
        cells += [_tested(view, point)] if tested else []
        rows.append(_row([*cells, *(_cost(view, point, cost) for cost in view.costs), said]))
    text = f"What the front gains: the {_e(view.objective.long('val'))} of its best point within the control's"
    text += f" {units.LABELS[view.primary]} (or 2 % above), less the control's."
    return _table(heads, rows) + f"<p class='note'>{text}</p>"


def _gain(view: SearchView, point: FrontPoint, gain: float) -> str:
    shade = "" if not view.objective.tells(gain) else "good" if gain > 0 else "bad"
    unit = " points" if view.objective.percent else ""
    return f"<span class='{shade}'>{view.objective.change(gain, near=point.val_accuracy)}{unit}</span>"


def _score_heads(view: SearchView, *, tested: bool) -> list[str]:
    return [view.objective.head(split) for split in (("val", "test") if tested else ("val",))]


def _card(view: SearchView, what: str, point: FrontPoint) -> str:
    lines = [f"{view.objective.difference(point.val_accuracy, view.dense.val_accuracy)} against dense"]
    if point.test_accuracy is not None:
        lines.append(f"test {_tested(view, point)}")
    shown = [c for c in view.costs if c in (*COSTS[:3], LATENCY)]
    lines.append(", ".join(f"{units.share(view.fraction(point, c))} of {units.LABELS[c]}" for c in shown))
    if "latency_ms" in point.metrics:
        lines.append(f"{_measured_head(view)} {_measured(view, point)} (dense {units.latency(view.dense.metrics)})")
    items = "".join(f"<li>{line}</li>" for line in lines)
    title = f"<span class='what'>{_e(what)}</span> <span class='soft'>trial {_e(point.name)}</span>"
    return f"<div class='card'>{title}<b>{view.objective.text(point.val_accuracy)}</b><ul>{items}</ul></div>"


def _prices(found: Explanation) -> str:
    label = units.LABELS[found.cost]
    weights = weighted(found)
    heads = ["group", "keeps", "uniform", "error", *(["weight"] if weights else [])]
    heads += [f"part of {label}", "price down", "price up"]
    rows = []
    for row in found.groups:
        shade = {CHEAP: "good", DEAR: "bad"}.get(row.verdict, "")
        cells = [
            _name(row.group),
            f"{row.width} <span class='unit'>of {row.size}</span>",
            str(row.uniform),
            number(row.error),
            *([f"{row.weight:.2f}"] if weights else []),
            "–" if row.share is None else units.percent(row.share, 0),
            f"<span class='{shade if row.verdict == CHEAP else ''}'>{price_text(row.down)}</span>",
            f"<span class='{shade if row.verdict == DEAR else ''}'>{price_text(row.up)}</span>",
        ]
        said = f"<td colspan='{len(heads)}'><div class='say'>{_e(sentence(found, row))}</div></td>"
        rows += [_row(cells, mark="told"), f"<tr>{said}</tr>"]
    return _table(heads, rows)


def _kept(width: int, size: int) -> str:
    part = 100.0 * width / size
    bar = f"<span class='bar'><i style='width:{part:.0f}%'></i></span>"
    return f"{bar}{width} <span class='unit'>{units.share(width / size)}</span>"


def _tested(view: SearchView, point: FrontPoint) -> str:
    if point.test_accuracy is None:
        return "–"
    margin, own = view.margin(point), view.objective
    around = "" if margin is None else f" <span class='unit'>± {own.spread(margin[0], near=point.test_accuracy)}</span>"
    return own.text(point.test_accuracy) + around


def _margins(view: SearchView) -> str:
    known = list(dict.fromkeys(m[1] for p in (view.dense, *view.front) if (m := view.margin(p)) is not None))
    return f"± is one {_e(' or '.join(known))}, of the {_e(view.objective.long('test'))}. " if known else ""


def _closing(view: SearchView) -> str:
    return _e(f"{hypervolume_sentence(view)} ({reference_sentence(view)}).")


def _cost(view: SearchView, point: FrontPoint, cost: str) -> str:
    share = units.share(view.fraction(point, cost))
    return f"{units.cost(cost, point.costs[cost])} <span class='unit'>{share}</span>"


def _measured(view: SearchView, point: FrontPoint) -> str:
    """Returns the measured latency, with a word where it did not fall or is above the limit."""
    text = units.latency(point.metrics)
    if point is not view.dense:
        text += " <span class='bad'>no faster</span>" if view.no_faster(point) else ""
        text += " <span class='bad'>over the limit</span>" if view.over_limit(point) else ""
    return text


def _measured_head(view: SearchView) -> str:
    return "measured" if LATENCY in view.costs else "latency"


def _has_latency(view: SearchView) -> bool:
    return any("latency_ms" in p.metrics for p in (view.dense, *view.front))


def _section(name: str, body: str) -> str:
    return f"<section id='{_anchor(name)}'><h2>{_e(name)}</h2>{body}</section>"


def _figure(name: str) -> str:
    return f"<div class='figure' id='{name}'></div>"


def _table(heads: Sequence[str], rows: Sequence[str]) -> str:
    head = "".join(f"<th>{_e(head)}</th>" for head in heads)
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"


def _row(cells: Sequence[str], mark: str = "") -> str:
    inner = "".join(f"<td>{cell}</td>" for cell in cells)
    return f"<tr class='{mark}'>{inner}</tr>" if mark else f"<tr>{inner}</tr>"


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")


def _name(group: str) -> str:
    """Returns a group's name, which may be broken after each dot where the screen is narrow."""
    return _e(group).replace(".", ".<wbr>")


def _e(text: str) -> str:
    return html.escape(text)
