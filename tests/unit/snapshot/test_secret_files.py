# SPDX-License-Identifier: Apache-2.0
"""Which files may hold a secret, by their place, their name, what names them, and what is in them."""

import pytest

from snapshot.secret_files import is_issued_anew, is_secret


@pytest.mark.parametrize(
    ("path", "named_by"),
    [
        ("/run/secrets/anything", []),
        ("/run/credentials/vllm.service/db", []),
        ("/run/user/1000/credentials/vllm.service/db", []),
        ("/etc/secrets/x", []),
        ("/srv/db_password", []),
        ("/srv/db-password.txt", []),
        ("/root/.pgpass", []),
        ("/root/.netrc", []),
        ("/srv/app/.env", []),
        ("/srv/tls/server.key", []),
        ("/srv/token", []),
        ("/srv/x", ["--db-pass-file"]),
        ("/srv/x", ["--ssl-keyfile"]),
        ("/srv/x", ["DB_PASSWORD_FILE"]),
        ("/srv/x", ["API_TOKEN_PATH"]),
    ],
)
def test_a_telling_name(path: str, named_by: list[str]) -> None:
    assert is_secret(path, named_by, b"")


@pytest.mark.parametrize(
    ("path", "named_by"),
    [
        ("/run/app/config.json", ["--config"]),
        ("/srv/tokenizer.json", ["--tokenizer"]),
        ("/srv/tokenizer_config.json", []),
        ("/srv/special_tokens_map.json", []),
        ("/srv/chat.jinja", ["--chat-template"]),
        ("/etc/passwd", []),
        ("/usr/bin/env", []),
        ("/usr/bin/htpasswd", []),
        ("/srv/compass.json", []),
        ("/srv/keyboard.txt", []),
        ("/srv/x", ["--max-num-batched-tokens-file"]),
    ],
)
def test_others(path: str, named_by: list[str]) -> None:
    assert not is_secret(path, named_by, b'{"answer": 42}')


@pytest.mark.parametrize(
    "content",
    [
        b"user: app\npassword: tiger",
        b"DB_PASS='tiger'",
        b'{"db": {"passwd": "tiger"}}',
        b"pin_secret = 4711",
        b"url: postgres://app:tiger@db/app",
    ],
)
def test_a_password_in_a_named_file(content: bytes) -> None:
    assert is_secret("/srv/config", [], content)
    assert not is_secret("/srv/config", [], None)


@pytest.mark.parametrize(
    "content",
    [b"password: null", b"bypass: always", b"url: http://db:5432/app", b"secret: true", b"\xff\0=:"],
)
def test_no_password_in_a_named_file(content: bytes) -> None:
    assert not is_secret("/srv/config", [], content)


def test_tokens_that_clients_read_again() -> None:
    assert is_issued_anew("/run/secrets/kubernetes.io/serviceaccount/token")
    assert is_issued_anew("/run/secrets/eks.amazonaws.com/serviceaccount/token")
    assert not is_issued_anew("/run/secrets/db")
