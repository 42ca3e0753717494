"""The state of searches, queue and service as one HTML page without scripts.

Decides what a newcomer sees first: is everything up, where are the pages, what runs, what waits and what to type. Must
not know where the values come from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from autoprune.report import units
from autoprune.report.status import best, best_head, trials

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#1c1c1e;background:#fff}
h1{font-size:1.3rem}h2{font-size:1.05rem;margin-top:2rem}
table{border-collapse:collapse;width:100%}
th{text-align:left;color:#666;font-weight:500}
th,td{padding:.35rem .8rem .35rem 0;border-bottom:1px solid #e5e5ea;vertical-align:top}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
code{background:#f2f2f7;padding:.1rem .3rem;border-radius:.25rem}
.s{font-weight:600}.running,.healthy,.finished{color:#157a3c}.failed,.failing{color:#b3261e}
.queued,.starting,.waiting,.stopped{color:#8a5a00}.cancelled{color:#666}
progress{width:6rem;vertical-align:middle}
@media (prefers-color-scheme:dark){body{background:#1c1c1e;color:#eee}
th,td{border-color:#3a3a3c}code{background:#2c2c2e}
a{color:#7ab8ff}.running,.healthy,.finished{color:#5fd38a}.failed,.failing{color:#ff8a80}
.queued,.starting,.waiting,.stopped{color:#ffcc66}th,.cancelled{color:#aaa}}
"""


def status_page(data: Mapping[str, Any]) -> str:
    """Returns the page; it asks for a new one every five seconds."""
    service = data["service"]
    services = service["services"] if service is not None else []
    body = [
        "<h1>autoprune</h1>",
        _table(("process", "state", "address", "restarts", ""), (_service(row) for row in services), numbers={3}),
        "<h2>Searches</h2>",
    ]
    if data["rows"]:
        highest = escape(best_head(data["rows"]))
        head = ("search", "state", "rung", "trials", "", highest, "rung ends in", "priority", "")
        body.append(_table(head, (_search(row) for row in data["rows"]), numbers={3, 5, 6, 7}))
    else:
        body.append("<p>None yet.</p>")
    body.append(
        "<p><code>autoprune submit SPACE</code> adds a search to the queue, <code>autoprune logs NAME --follow</code>"
        " shows what it does, <code>autoprune front NAME</code> what it has found, <code>autoprune cancel NAME</code>"
        f" ends it. Home folder: <code>{escape(str(data['home']))}</code></p>"
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="refresh" content="5">'
        '<meta name="viewport" content="width=device-width"><title>autoprune: status</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


def _service(row: Mapping[str, Any]) -> list[str]:
    address = escape(row["address"] or "")
    link = f'<a href="{address}">{address}</a>' if address else "–"
    return [escape(row["name"]), _state(row["state"]), link, str(row["restarts"]), escape(row["reason"])]


def _search(row: Mapping[str, Any]) -> list[str]:
    left = row.get("seconds_left")
    bar = f'<progress max="{row["total"]}" value="{row["done"]}"></progress>' if row["total"] else ""
    return [
        escape(row["name"]),
        _state(row["state"]),
        escape(row["rung"] or "–"),
        trials(row),
        bar,
        escape(best(row)),
        "–" if left is None else units.seconds(left),
        "–" if row["priority"] is None else str(row["priority"]),
        escape(row["reason"]),
    ]


def _state(state: str) -> str:
    return f'<span class="s {escape(state)}">{escape(state)}</span>'


def _table(head: tuple[str, ...], rows: Iterable[list[str]], *, numbers: set[int]) -> str:
    def line(cells: Iterable[str], tag: str) -> str:
        marked = (f"<{tag}{' class=n' if i in numbers else ''}>{cell}</{tag}>" for i, cell in enumerate(cells))
        return f"<tr>{''.join(marked)}</tr>"

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"
