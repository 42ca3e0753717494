"""The command that measures a latency table."""

from __future__ import annotations

from autoprune.cli.shared import (
    HOME,
    CodeOption,
    HomeOption,
    JsonOption,
    SetOption,
    SpaceArgument,
    app,
    guarded,
    load_settings,
    show,
)


@app.command()
@guarded
def latency(
    space: SpaceArgument = None,
    as_json: JsonOption = False,
    overrides: SetOption = None,
    home: HomeOption = HOME,
    allow_code: CodeOption = False,
) -> None:
    """Measure what widths cost in milliseconds on this device, and how well that predicts a network's latency."""
    loaded = load_settings(space, overrides, allow_code=allow_code)
    from autoprune.coordinator import latency_space

    text, data = latency_space(loaded, home=home)
    show(text, data, as_json=as_json)
