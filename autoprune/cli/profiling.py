"""The command that shows where the time of a search goes."""

from __future__ import annotations

from typing import Annotated

import typer

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
def profile(
    space: SpaceArgument = None,
    repeats: Annotated[int, typer.Option(min=1, help="Trials of each kind; their medians count.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Training steps that are really run; the rest is scaled.")] = 20,
    as_json: JsonOption = False,
    overrides: SetOption = None,
    home: HomeOption = HOME,
    allow_code: CodeOption = False,
) -> None:
    """Show how long the stages of a trial take, beside their forward and backward passes alone, and write traces."""
    loaded = load_settings(space, overrides, check_files=True, allow_code=allow_code)
    from autoprune.coordinator import profile_space

    text, data = profile_space(loaded, home=home, repeats=repeats, steps=steps)
    show(text, data, as_json=as_json)
