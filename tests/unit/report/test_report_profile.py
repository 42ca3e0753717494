"""The text of a profile."""

from autoprune.report import render_profile

DATA = {
    "device": "cpu",
    "threads": 1,
    "groups": 9,
    "preparation": [{"stage": "trace", "seconds": 2.0, "floor": 0.5}],
    "trials": [
        {
            "rung": "tune",
            "seconds": 10.0,
            "floor": 8.0,
            "ratio": 1.25,
            "steps": 20,
            "whole_steps": 180,
            "stages": [
                {"stage": "surgery", "seconds": 0.01, "floor": 0.0},
                {"stage": "fine_tuning", "seconds": 9.99, "floor": 8.0},
            ],
        }
    ],
    "bookkeeping_seconds": 0.067,
    "traces": ["home/profile/a-tune.json.gz"],
}


def lines() -> dict[str, list[str]]:
    text = render_profile(DATA, title="a")
    return {" ".join(words[:2]): words for words in map(str.split, text.splitlines()) if words}


def test_every_stage_shows_its_time_its_passes_and_its_share() -> None:
    found = lines()
    assert found["fine tuning"][2:] == ["9.99", "s", "8.00", "s", "1.99", "s", "100%"]
    assert found["surgery 10.0"][3:] == ["–", "10.0", "ms", "0%"]
    assert found["trace 2.00"][3:6] == ["500", "ms", "1.50"]


def test_what_is_scaled_is_said_and_so_is_the_clock() -> None:
    text = render_profile(DATA, title="a")
    assert "tune: 1.25 times its forward and backward passes (training: 20 of 180 steps, scaled)." in text
    assert text.startswith("a: processor time on cpu, 1 thread(s), 9 pruning groups")
    assert "elapsed time on NVIDIA" in render_profile({**DATA, "device": "NVIDIA"}, title="a")
    assert "67.0 ms" in text
