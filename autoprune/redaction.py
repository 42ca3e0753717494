"""Secrets in addresses: found and hidden before a text is shown, logged or stored.

Decides what counts as a secret: the password of `scheme://user:password@host`, a lone token of `https://token@host`,
and query fields with names such as `password` or `token`. Must not know where a text goes.
"""

from __future__ import annotations

import re

HIDDEN = "***"

_QUOTES = r"\s'\"<>"
# The password goes up to the last `@`, as database drivers read it; digits and a slash are a port and a path.
_PASSWORD = re.compile(rf"(://[^:/@{_QUOTES}]*):(?!\d+(?:/|$))[^{_QUOTES}]*@")
_TOKEN = re.compile(rf"(https?://)[^:/?#@{_QUOTES}]+@", re.IGNORECASE)
_FIELD = re.compile(
    rf"([?&;](?:[a-z_]*password|passwd|pwd|[a-z_]*token|api_?key|[a-z_]*secret|access_?key|sig|signature)=)[^&;{_QUOTES}]+",
    re.IGNORECASE,
)


def hide_secrets(text: str) -> str:
    """Returns `text` with `***` in the place of every secret that its addresses hold."""
    if "://" not in text:
        return text
    text = _PASSWORD.sub(rf"\1:{HIDDEN}@", text)
    text = _TOKEN.sub(rf"\1{HIDDEN}@", text)
    return _FIELD.sub(rf"\1{HIDDEN}", text)


def holds_secret(text: str) -> bool:
    """Whether an address in `text` holds a secret."""
    return hide_secrets(text) != text


def public_address(url: str) -> str:
    """Returns the address of a server without who logs in, as a link for everybody."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return url
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"
