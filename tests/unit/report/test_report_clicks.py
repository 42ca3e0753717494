"""A click on a point of the interactive front."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from autoprune.report import SearchView, figure_html, front_figure

LINKS = {0: "/#/experiments/7/runs/aaa", 1: "/#/experiments/7/runs/bbb", 99: "/#/experiments/7/runs/zzz"}


def rows(figure: Any, name: str) -> list[list[str]]:
    return [list(row) for row in next(t for t in figure.data if t.name == name).customdata]


def test_a_point_with_a_link_holds_it_and_says_that_it_can_be_clicked(view: SearchView) -> None:
    figure = front_figure(view, links=LINKS)
    linked = {row[1]: row[0] for name in ("front", "other trials") for row in rows(figure, name) if len(row) == 2}
    assert set(linked) == {LINKS[0], LINKS[1]}
    assert "<b>trial 1</b>" in linked[LINKS[1]]
    assert all(said.endswith("<i>click: its MLflow run</i>") for said in linked.values())


def test_a_point_whose_run_is_not_recorded_says_nothing_of_a_click(view: SearchView) -> None:
    figure = front_figure(view, links={1: LINKS[1]})
    plain = [row for name in ("front", "other trials") for row in rows(figure, name) if len(row) == 1]
    assert len(plain) == len(view.trials) - 1
    assert not any("click" in row[0] for row in plain)
    assert all(len(row) == 1 for name in ("controls (uniform, global)", "dense network") for row in rows(figure, name))


def test_a_test_accuracy_leads_to_the_run_of_its_trial(view: SearchView) -> None:
    tested = replace(view, trials=tuple(replace(p, test_accuracy=p.val_accuracy - 0.01) for p in view.trials))
    found = rows(front_figure(tested, links=LINKS), "front, test accuracy")
    assert [row[1:] for row in found if "<b>trial 1</b>" in row[0]] == [[LINKS[1]]]


def test_the_page_opens_links_at_the_server_in_a_window_of_its_own(view: SearchView) -> None:
    page = figure_html(front_figure(view, links=LINKS), address="http://127.0.0.1:5000")
    assert 'new URL(location.href).origin : "http://127.0.0.1:5000"' in page
    assert 'window.open(address, "_blank")' in page
    assert LINKS[1] in page.replace("\\u002f", "/")
    assert "{plot_id}" not in page


def test_an_address_cannot_end_the_script(view: SearchView) -> None:
    page = figure_html(front_figure(view, links=LINKS), address="http://a/</script><script>alert(1)")
    assert "</script><script>alert(1)" not in page


def test_a_figure_without_links_is_what_it_was(view: SearchView) -> None:
    assert front_figure(view, links={}).to_json() == front_figure(view).to_json()
    page = figure_html(front_figure(view))
    assert 'plotly_click", (event)' not in page
    assert "its MLflow run" not in page
