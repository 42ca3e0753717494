"""A console that writes to a string: what tables are rendered on.

Decides that text is plain unless colours were asked for.
"""

from __future__ import annotations

import io
import shutil
import sys

from rich.console import Console


def text_console(width: int, color: bool) -> Console:
    """Returns a console of `width` columns; its text is read back by `text_of`."""
    return Console(
        file=io.StringIO(),
        width=width,
        force_terminal=color,
        color_system="standard" if color else None,
        no_color=not color,
        markup=False,
        emoji=False,
        highlight=False,
    )


def text_of(console: Console) -> str:
    """Returns what was written to a `text_console`, without spaces at the ends of lines."""
    file = console.file
    assert isinstance(file, io.StringIO)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


def terminal() -> tuple[int, bool]:
    """Returns the columns of the terminal and whether it shows colours; wide and plain where output is piped."""
    if not sys.stdout.isatty():
        return 140, False
    return max(60, shutil.get_terminal_size((120, 40)).columns), True


def has_unicode() -> bool:
    """Whether the terminal can write the characters of a picture."""
    try:
        "●╌┊│".encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True
