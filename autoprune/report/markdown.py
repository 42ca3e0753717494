"""The front, one of its networks, and how to go on from there, as Markdown for the web pages and for model cards.

Decides what these texts say. Must not know where they are shown: links come from whoever does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from autoprune.cost import LATENCY, MACS, PARAMS, SIZE
from autoprune.report import units
from autoprune.report.view import FrontPoint, SearchView


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table; the first column is aligned to the left, the others to the right."""
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def front_markdown(view: SearchView, links: Mapping[int, str], *, names: Mapping[int, str] | None = None) -> str:
    """Returns the front as a table in order of rising cost, with the dense network first.

    Args:
        view: The search.
        links: Where a trial's number leads to; numbers that it lacks are plain.
        names: Further names of trials, such as `knee`, written beside the number.
    """
    tested = any(point.test_accuracy is not None for point in view.front)
    timed = any("latency_ms" in point.metrics for point in view.front)
    own = view.objective
    head = ["trial", own.label("val"), *([own.label("test")] if tested else [])]
    costs = [cost for cost in view.costs if cost in (MACS, PARAMS, SIZE, LATENCY, view.primary)]
    head += [*(units.LABELS[cost] for cost in costs), *([_measured_head(view)] if timed else []), "criterion"]
    rows = []
    for point in (view.dense, *view.front):
        number = point.name if point.trial is None else str(point.trial)
        if point.trial is not None and point.trial in links:
            number = f"[{number}]({links[point.trial]})"
        if point.trial is not None and names and point.trial in names:
            number += f" ({names[point.trial]})"
        row = [number, own.text(point.val_accuracy, 2)]
        row += [own.text(math.nan if point.test_accuracy is None else point.test_accuracy, 2)] if tested else []
        row += [_cost(view, point, cost) for cost in costs]
        row += [units.latency(point.metrics)] if timed else []
        rows.append([*row, point.criterion or "–"])
    return table(head, rows)


def comparison_markdown(view: SearchView, point: FrontPoint) -> str:
    """Returns one network beside the dense one: accuracies, costs and latency, a row each."""
    dense, own = view.dense, view.objective

    def row(split: str, before: float, after: float) -> list[str]:
        head = f"{own.label(split)}{own.hint}"
        return [head, own.text(before, 2), own.text(after, 2), own.difference(after, before)]

    rows = [row("val", dense.val_accuracy, point.val_accuracy)]
    given = dense.metrics.get("test_accuracy", dense.test_accuracy)
    if point.test_accuracy is not None and given is not None:
        rows.append(row("test", given, point.test_accuracy))
    for cost in view.costs:
        share = units.share(view.fraction(point, cost))
        values = [units.cost(cost, p.costs[cost]) for p in (dense, point)]
        rows.append([units.AXES[cost], *values, f"{share} of dense"])
    if "latency_ms" in point.metrics:
        times = [units.latency(p.metrics) for p in (dense, point)]
        rows.append(["latency, as the search measured it", *times, ""])
    return table(["", "dense", "pruned", "change"], rows)


def widths_markdown(sizes: Mapping[str, int], widths: Mapping[str, int], criteria: Mapping[str, str]) -> str:
    """Returns what a policy keeps of every group, with a bar a row."""
    rows = []
    for group, size in sizes.items():
        width = widths.get(group, size)
        filled = max(1, round(10 * width / size))
        rows.append([f"`{group}`", f"{width} of {size}", "█" * filled + "░" * (10 - filled), criteria.get(group, "–")])
    return table(["group", "channels kept", "", "criterion"], rows)


def search_markdown(
    view: SearchView, *, links: Mapping[int, str], pages: Mapping[str, str], picture: str | None, commands: str
) -> str:
    """Returns the description of a finished search: what was searched, the front, where to look, how to pick.

    Args:
        view: The search.
        links: The page of each trial of the front.
        pages: Further pages by their names.
        picture: Address of the front's picture.
        commands: The sentence that says how to export a pick.
    """
    limits = ", ".join(f"{units.AXES[name]} at most {units.cost(name, n)}" for name, n in view.limits.items())
    front, knee, area = view.front, view.knee, view.objective.area
    names = {knee.trial: "knee"} if knee is not None and knee.trial is not None else {}
    parts = [
        f"**{len(front)} networks on the front** of {len(view.trials)} trials of the rung `{view.rung}`"
        f" ({limits or 'no budget'}); hypervolume {area(view.hypervolume)}"
        + (f", simple policies alone {area(view.controls_hypervolume)}." if view.controls else "."),
        " · ".join(f"[{name}]({page})" for name, page in pages.items()),
        "**Pick one**: open a version of the registered model and add the alias `picked`, or give a run the tag"
        f" `pick` with the value `true`. {commands}",
        front_markdown(view, links, names=names),
        f"![the front]({picture})" if picture else "",
        "\n".join(f"- {note}" for note in view.notes),
    ]
    return "\n\n".join(part for part in parts if part)


def version_markdown(view: SearchView, point: FrontPoint, *, address: str, export: str) -> str:
    """Returns the description of a registered version.

    Args:
        view: The search.
        point: The network.
        address: How it is loaded, such as `models:/autoprune-digits/3`.
        export: The command that writes it to disk.
    """
    return "\n\n".join(
        [
            f"{_named(view, point)} at {units.share(view.fraction(point))} of the"
            f" {units.LABELS[view.primary]}: trial {point.name} of the search **{view.name}** (rung `{view.rung}`),"
            f" proposed by {point.origin or '–'}; channels ranked by {point.criterion or '–'}.",
            comparison_markdown(view, point),
            "```python\nimport mlflow\n\n"
            f'model = mlflow.pyfunc.load_model("{address}")\nlogits = model.predict(samples)  # float32 array\n```',
            f"As a file: `{export}`. Add the alias `picked` to choose this version.",
        ]
    )


def _named(view: SearchView, point: FrontPoint) -> str:
    own = view.objective
    text = own.text(point.val_accuracy)
    return text if own.percent else f"{own.label('val')} {text}{own.hint}"


def _cost(view: SearchView, point: FrontPoint, cost: str) -> str:
    value = units.cost(cost, point.costs[cost])
    return value if point is view.dense else f"{value} ({units.share(view.fraction(point, cost))})"


def _measured_head(view: SearchView) -> str:
    return "measured" if LATENCY in view.costs else "latency"
