"""Secrets are hidden wherever an address stands in a text, and nothing else is touched."""

from __future__ import annotations

import pytest

from autoprune.redaction import hide_secrets, holds_secret, public_address


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://u:hunter2@h/db", "postgresql://u:***@h/db"),
        ("postgresql+psycopg://u:hunter2@h:5432/db?x=1", "postgresql+psycopg://u:***@h:5432/db?x=1"),
        ("postgresql://u:hunter@2@h/db", "postgresql://u:***@h/db"),
        ("postgresql://u:hun/ter2@h/db", "postgresql://u:***@h/db"),
        ("postgresql://:hunter2@h/db", "postgresql://:***@h/db"),
        ("cannot open 'mysql://u:hunter2@h/db': away", "cannot open 'mysql://u:***@h/db': away"),
        ("postgresql://u@h/db?password=hunter2&x=1", "postgresql://u@h/db?password=***&x=1"),
        ("postgresql://u@h/db?sslpassword=hunter2", "postgresql://u@h/db?sslpassword=***"),
        ("https://hunter2@host/repo", "https://***@host/repo"),
        ("https://u:hunter2@host/", "https://u:***@host/"),
        ("https://host/x?access_token=hunter2#top", "https://host/x?access_token=***"),
        ("one redis://:hunter2@a two https://b:hunter2@c", "one redis://:***@a two https://b:***@c"),
    ],
)
def test_a_secret_is_hidden(text: str, shown: str) -> None:
    assert hide_secrets(text) == shown
    assert holds_secret(text)
    assert "hunter" not in hide_secrets(text)


@pytest.mark.parametrize(
    "text",
    [
        "http://127.0.0.1:5000/#/models/autoprune-digits@knee",
        "http://127.0.0.1:5000",
        "sqlite:////home/a@b/mlflow.db",
        "postgresql://u@h:5432/db",
        "models:/autoprune-digits@knee",
        "name@picked and key: value",
        "s3://bucket/a:b",
        "https://host/x?page=2&order=token",
    ],
)
def test_what_is_no_secret_is_left_alone(text: str) -> None:
    assert hide_secrets(text) == text
    assert not holds_secret(text)


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("https://u:hunter2@host:5000/base", "https://host:5000/base"),
        ("https://hunter2@host", "https://host"),
        ("http://127.0.0.1:5000/a@b", "http://127.0.0.1:5000/a@b"),
        ("plain", "plain"),
    ],
)
def test_a_public_address_says_nothing_of_who_logs_in(url: str, address: str) -> None:
    assert public_address(url) == address
