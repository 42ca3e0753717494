"""What a click on a point of an interactive figure does: it opens the page that the point links to.

Decides the script of such a page. Must not know which points have links: the second entry of a point's `customdata`
is an address after the server's own, or missing.

MLflow's pages show a figure in a frame that may open no windows (`sandbox="allow-scripts"`). There the click shows the
link below the figure instead: a person who clicks it with Ctrl held down gets a window all the same. The frame's
address tells where that server is, which may be another place than the one that the search knew.
"""

from __future__ import annotations

import json

CLICK = "click: its MLflow run"
"""What a point that can be clicked says at its end."""

_SCRIPT = """
const figure = document.getElementById("{plot_id}");
const server = location.protocol === "blob:" ? new URL(location.href).origin : ADDRESS;
const bar = document.createElement("div");
bar.id = "clicked";
bar.hidden = true;
bar.style.cssText = "position:fixed;left:0;right:0;bottom:0;padding:8px 12px;background:#fff;"
  + "border-top:1px solid #a9b4c2;font:13px Helvetica,Arial,sans-serif;overflow-wrap:anywhere";
document.body.appendChild(bar);
figure.on("plotly_click", (event) => {
  const point = event.points.find((p) => Array.isArray(p.customdata) && p.customdata[1]);
  if (!point) return;
  const address = server + point.customdata[1];
  const opened = window.open(address, "_blank");
  if (opened) { opened.opener = null; bar.hidden = true; return; }
  const link = document.createElement("a");
  link.href = address;
  link.target = "_blank";
  link.rel = "noopener";
  link.textContent = address;
  bar.replaceChildren("Its MLflow run (Ctrl or ⌘ and a click, or the middle button, opens it): ", link);
  bar.hidden = false;
  getSelection().selectAllChildren(link);
});
"""


def click_script(address: str) -> str:
    """Returns the script; `address` is the server's, for a page that is opened outside of the server's own pages."""
    return _SCRIPT.replace("ADDRESS", json.dumps(address).replace("<", "\\u003c"))
