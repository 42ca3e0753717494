"""The text of `autoprune inspect`: short names, what the marks mean, frozen layers by their reason."""

import pytest

from autoprune.report import render_inspection
from autoprune.report.names import beside, collapse

COSTS = {"macs": 1000, "params": 500, "size_bytes": 2000, "activation_bytes": 64}


def group(name, producers, consumers, approximate=None, widths=(2, 8)):
    return {
        "name": name,
        "size": 8,
        "stage": "stage1",
        "scope": "stage1",
        "widths": widths and list(widths),
        "macs_share": 0.25,
        "params_share": 0.5,
        "producers": producers,
        "consumers": consumers,
        "approximate": approximate,
    }


def text(groups, frozen=(), notes=()):
    return render_inspection(
        {
            "dense": COSTS,
            "narrowest": {**COSTS, "macs": 200, "params": 50},
            "input_shape": [3, 8, 8],
            "groups": groups,
            "frozen": list(frozen),
            "notes": list(notes),
        },
        title="net",
        console_width=140,
    )


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.0.b", "a.1.b", "a.2.b", "c"], ["a.0–2.b", "c"]),
        (["a.0.b", "a.2.b", "a.5.b"], ["a.0,2,5.b"]),
        (["l1.0.conv1", "l1.0.conv2", "l1.1.conv1", "l1.1.conv2"], ["l1.0–1.conv1–2"]),
        (["l1.0.conv1", "l1.1.conv2"], ["l1.0.conv1", "l1.1.conv2"]),
        (["x", "x"], ["x"]),
        ([], []),
    ],
    ids=str,
)
def test_names_that_differ_in_one_number_are_written_as_one(names, expected):
    assert collapse(names) == expected


def test_a_name_is_written_from_where_it_leaves_the_groups_path():
    assert beside("layer1.0.conv2", "layer1.0.conv1") == "….conv2"
    assert beside("fc", "layer1.0.conv1") == "fc"
    assert beside("layer1", "layer1") == "layer1"


def test_groups_tell_what_goes_with_them_and_who_reads_them():
    shown = text([group("s.0.a", ["s.0.a", "s.1.a", "s.2.a"], ["s.1.b", "s.2.b", "fc"]), group("t", ["t"], [])])
    row, other = (line for line in shown.splitlines() if line.startswith(("s.0.a", "t ")))
    assert "….1–2.a" in row
    assert "….1–2.b, fc" in row
    assert other.rstrip().endswith("nothing")
    assert "leave 20% of the MACs and 10% of the parameters" in shown


def test_the_mark_of_approximate_groups_is_explained():
    shown = text([group("a", ["a"], ["b"], "the LayerNorm n averages over these channels"), group("b", ["b"], ["c"])])
    assert "a ≈" in shown
    assert "≈ removing a channel also shifts those that stay: the LayerNorm n averages over these channels" in shown
    assert "≈" not in text([group("a", ["a"], ["b"])])


def test_frozen_layers_are_gathered_by_their_reason():
    frozen = [
        {"name": f"block.{k}.attn", "size": 12, "reason": f"block.{k} reshapes channels together"} for k in range(4)
    ]
    shown = text([group("a", ["a"], ["b"])], [*frozen, {"name": "head", "size": 10, "reason": "the model's output"}])
    assert "5 frozen layers" in shown
    assert "block.0–3 reshapes channels together" in shown
    assert "block.0–3.attn" in shown
    assert shown.count("reshapes") == 1


def test_an_excluded_group_keeps_all_and_notes_are_told():
    shown = text([group("a", ["a"], ["b"], widths=None)], notes=["something"])
    assert "all (excluded)" in shown
    assert "Note: something" in shown
    assert "1 pruning group\n" in shown
