# SPDX-License-Identifier: Apache-2.0
"""Pulls where redirects, ranges, connections or logins are at fault. Each row is one misbehaviour."""

from pathlib import Path

import pytest

from rekindle.errors import (
    CredentialsError,
    IntegrityError,
    NotFoundError,
    RegistryError,
)
from tests.samples.pulls import (
    any_size,
    assert_ranges,
    at_most,
    challenge,
    check_pull,
    each_byte_once,
    redirect,
    shifted,
    token,
)
from tests.samples.registry import (
    CALM,
    STRETCH,
    WRONG,
    Case,
    Sample,
    parametrize,
    times_asked,
)
from tests.servers.registry import misbehaviour as wrong
from tests.servers.registry.access import Auth
from tests.servers.registry.misbehaviour import ANYTHING, TOKEN, blob, manifest
from tests.servers.registry.wire import Kind

pytestmark = pytest.mark.usefixtures("small_stretches")

PULLS = [
    # Redirects.
    Case(
        name="redirects to another host",
        make=lambda _: [wrong.redirects(blob())],
        auth=Auth.TOKEN,
        look=each_byte_once,
    ),
    Case(name="302, and a password", make=lambda _: [wrong.redirects(blob(), 302)], auth=Auth.BASIC),
    Case(name="redirects of manifests", make=lambda _: [wrong.redirects(manifest())], auth=Auth.BASIC),
    Case(name="links that expire at once", make=lambda _: [wrong.redirects(blob(), expired=2)]),
    Case(
        name="links that expire midway",
        make=lambda s: [
            wrong.redirects(blob()),
            wrong.status(403, on=blob(s.big.digest, elsewhere=True), skip=3, times=2),
        ],
        auth=Auth.TOKEN,
    ),
    Case(
        name="links that never work",
        make=lambda _: [wrong.redirects(blob(), expired=10**6)],
        error=RegistryError,
        word="403",
    ),
    Case(
        name="a redirect loop",
        make=lambda s: [wrong.redirects(blob(s.big.digest), to="")],
        error=RegistryError,
        word="more than 5",
        seconds=1,
    ),
    *(
        Case(
            name=f"a redirect to {where}",
            make=redirect(where),
            error=RegistryError,
            word="leads nowhere",
            seconds=1,
        )
        for where in (
            "file:///etc/passwd",
            "ftp://127.0.0.1/x",
            "http://user:word@127.0.0.1/",
            "http://a..b/",
            "http://[::1/",
            "http://127.0.0.1:99999/",
            f"http://{'a' * 64}.example/",
        )
    ),
    Case(
        name="a redirect to nobody",
        make=redirect("http://127.0.0.1:1/"),
        error=RegistryError,
        word="refused",
    ),
    Case(
        name="a redirect without Location",
        make=lambda _: [wrong.answers(blob(), code=307)],
        error=RegistryError,
        word="Location",
        seconds=1,
    ),
    # Ranges.
    Case(name="no ranges", make=lambda _: [wrong.ignores_range()], look=at_most(3)),
    Case(
        name="no ranges, in chunks",
        make=lambda _: [wrong.chunked(blob()), wrong.ignores_range()],
        look=at_most(3),
    ),
    Case(
        name="no ranges after some",
        make=lambda s: [wrong.ignores_range(blob(s.big.digest), skip=3)],
    ),
    Case(
        name="no ranges, and it breaks",
        make=lambda s: [
            wrong.ignores_range(),
            wrong.closes(blob(s.big.digest), after_bytes=5 * STRETCH, skip=1, times=2),
        ],
    ),
    Case(
        name="no ranges, and a small blob breaks",
        make=lambda s: [wrong.ignores_range(), wrong.closes(blob(s.small.digest), after_bytes=500, times=1)],
    ),
    Case(
        name="no ranges, wrong bytes",
        make=lambda s: [wrong.ignores_range(), wrong.wrong_bytes(s.big.digest)],
        error=IntegrityError,
        word="digest",
    ),
    Case(
        name="no ranges, 404 after all",
        make=lambda s: [
            wrong.status(404, on=blob(s.big.digest), skip=1),
            wrong.ignores_range(),
        ],
        error=NotFoundError,
        word="does not have what was asked for",
    ),
    Case(
        name="another range",
        make=lambda s: [wrong.another_range(blob(s.big.digest), shifted, lie=False, skip=2)],
        error=RegistryError,
        word="it sends",
    ),
    Case(
        name="another range, and a lie",
        make=lambda s: [wrong.another_range(blob(s.big.digest), shifted, lie=True, skip=2)],
        error=IntegrityError,
        word="digest",
    ),
    Case(
        name="Content-Range without a size",
        make=lambda _: [wrong.Misbehaviour(on=blob(), act=lambda q, go: any_size(go(q)))],
    ),
    Case(
        name="Content-Range missing",
        make=lambda _: [wrong.header(blob(), "Content-Range", None)],
        error=RegistryError,
        word="it sends",
    ),
    # Connections.
    Case(
        name="stalls before the headers",
        make=lambda s: [wrong.stalls(blob(s.big.digest), after_bytes=-1, times=1)],
    ),
    Case(name="stalls after the headers", make=lambda s: [wrong.stalls(blob(s.big.digest), times=1)]),
    Case(
        name="stalls in the body",
        make=lambda s: [wrong.stalls(blob(s.big.digest), after_bytes=20_000, times=2)],
        look=at_most(1),
    ),
    Case(
        name="stalls for ever",
        make=lambda s: [wrong.stalls(blob(s.big.digest), after_bytes=100)],
        error=RegistryError,
        word="stalls",
        seconds=4,
    ),
    Case(
        name="stalls before the headers for ever",
        make=lambda s: [wrong.stalls(blob(s.big.digest), after_bytes=-1)],
        error=RegistryError,
        word="in time",
        seconds=4,
    ),
    Case(
        name="stalls at once",
        make=lambda _: [wrong.stalls(manifest(), after_bytes=-1)],
        error=RegistryError,
        word="in time",
        seconds=1,
    ),
    Case(
        name="stalls in the manifest",
        make=lambda _: [wrong.stalls(manifest(), after_bytes=5, times=1)],
    ),
    Case(
        name="stalls in the manifest for ever",
        make=lambda _: [wrong.stalls(manifest(), after_bytes=5)],
        error=RegistryError,
        word="stalls",
    ),
    Case(name="drips", make=lambda s: [wrong.slow(blob(s.big.digest), 10, times=1)], seconds=3),
    Case(
        name="drips for ever",
        make=lambda s: [wrong.slow(blob(s.small.digest), 50)],
        error=RegistryError,
        word="stalls",
        seconds=4,
    ),
    Case(
        name="drips in chunks",
        make=lambda s: [wrong.chunked(blob()), wrong.slow(blob(s.big.digest), 10, times=1)],
        seconds=3,
    ),
    Case(
        name="breaks and breaks",
        make=lambda s: [wrong.closes(blob(s.big.digest), after_bytes=STRETCH // 2, times=12)],
        seconds=5,
        look=each_byte_once,
    ),
    Case(
        name="breaks in a small blob",
        make=lambda s: [wrong.closes(blob(s.small.digest), after_bytes=400, times=2)],
        look=lambda r, s: assert_ranges(r, s.small.digest, [None, "bytes=400-999", "bytes=800-999"]),
    ),
    Case(
        name="resets",
        make=lambda s: [wrong.resets(blob(s.big.digest), after_bytes=STRETCH // 2, times=4)],
        seconds=5,
    ),
    Case(
        name="resets for ever",
        make=lambda s: [wrong.resets(blob(s.small.digest), after_bytes=0)],
        error=RegistryError,
        word="3 times in a row",
    ),
    Case(
        name="breaks in chunks",
        make=lambda s: [wrong.chunked(blob()), wrong.closes(blob(s.big.digest), after_bytes=9000, times=2)],
    ),
    Case(name="hangs up after each answer", make=lambda _: [wrong.hangs_up(ANYTHING)]),
    Case(
        name="says close",
        make=lambda _: [wrong.header(ANYTHING, "Connection", "close")],
    ),
    Case(
        name="says close, and stalls",
        make=lambda s: [
            wrong.header(ANYTHING, "Connection", "close"),
            wrong.stalls(blob(s.big.digest), after_bytes=100, times=1),
        ],
    ),
    Case(
        name="announces more than it sends",
        make=lambda s: [wrong.content_length(blob(s.small.digest), 5)],
        error=RegistryError,
        word="should have",
    ),
    Case(name="restarts midway", make=lambda s: [wrong.restarts(blob(s.big.digest), 0.2, skip=3, times=1)]),
    Case(
        name="a straggler",
        make=lambda s: [wrong.slow(blob(s.big.digest), STRETCH / 20, skip=6, times=1)],
        settings=CALM,
        straggler_seconds=0.3,
        seconds=3,  # the straggler would take 20
    ),
    # Who we are.
    Case(name="a token", auth=Auth.TOKEN, look=times_asked(1, Kind.TOKEN)),
    Case(name="a password", auth=Auth.BASIC),
    Case(
        name="nobody's token",
        auth=Auth.TOKEN,
        credentials=None,
        options={"anonymous_pull": True},
    ),
    Case(
        name="tokens that expire midway",
        make=lambda _: [wrong.tokens_expire(after=4)],
        auth=Auth.TOKEN,
        look=each_byte_once,
    ),
    Case(name="tokens for a second", auth=Auth.TOKEN, options={"token_seconds": 1}),
    Case(
        name="no password",
        auth=Auth.BASIC,
        credentials=None,
        error=CredentialsError,
        word="docker login",
        seconds=0.5,
        look=times_asked(1, Kind.MANIFEST),
    ),
    Case(
        name="a wrong password",
        auth=Auth.BASIC,
        credentials=WRONG,
        error=CredentialsError,
        word="refuses the password",
        seconds=0.5,
        look=times_asked(2, Kind.MANIFEST),
    ),
    Case(
        name="a wrong password for a token",
        auth=Auth.TOKEN,
        credentials=WRONG,
        error=CredentialsError,
        word="docker login",
        seconds=0.5,
        look=times_asked(1, Kind.TOKEN),
    ),
    Case(
        name="no token for nobody",
        auth=Auth.TOKEN,
        credentials=None,
        error=CredentialsError,
        word="has no credentials",
        seconds=0.5,
        look=times_asked(1, Kind.TOKEN),
    ),
    Case(
        name="401 whatever we bring",
        make=lambda _: [wrong.unauthorized()],
        auth=Auth.TOKEN,
        error=CredentialsError,
        word="tokens",
        seconds=1,
        look=times_asked(4, Kind.TOKEN),
    ),
    *(
        Case(
            name=f"401 with a challenge, {name}",
            make=challenge(value),
            error=error,
            word=word,
            seconds=1,
            look=times_asked(2, Kind.MANIFEST),
        )
        for name, value, error, word in (
            ("unknown", "Negotiate", CredentialsError, "does not support"),
            ("empty", "", CredentialsError, "does not support"),
            ("without a realm", "Bearer", RegistryError, "realm"),
            ("with a realm that is none", 'Bearer realm="file:///etc/passwd"', RegistryError, "realm"),
            ("elsewhere in plain text", 'Bearer realm="http://192.0.2.1/t"', RegistryError, "without TLS"),
            ("long", "a" * 60_000, CredentialsError, "does not support"),
        )
    ),
    Case(
        name="a token endpoint that refuses",
        make=lambda _: [wrong.status(403, on=TOKEN)],
        auth=Auth.TOKEN,
        error=CredentialsError,
        word="403",
        look=times_asked(1, Kind.TOKEN),
    ),
    Case(
        name="a token endpoint that fails once",
        make=lambda _: [wrong.status(503, on=TOKEN, times=1)],
        auth=Auth.TOKEN,
    ),
    Case(
        name="a token endpoint that fails",
        make=lambda _: [wrong.status(503, on=TOKEN)],
        auth=Auth.TOKEN,
        error=RegistryError,
        word="503",
        look=times_asked(3, Kind.TOKEN),
    ),
    Case(
        name="a token endpoint that redirects",
        make=lambda _: [wrong.answers(TOKEN, code=302, headers={"Location": "http://192.0.2.1/"})],
        auth=Auth.TOKEN,
        error=RegistryError,
        word="302",
    ),
    *(
        Case(
            name=f"a token that is {name}",
            make=token(content),
            auth=Auth.TOKEN,
            error=RegistryError,
            word=word,
            seconds=1,
        )
        for name, content, word in (
            ("rubbish", b"rubbish", "no token"),
            ("missing", b"{}", "no token"),
            ("a number", b'{"token": 1}', "no token"),
            ("a header", b'{"token": "a\\r\\nX-Evil: 1"}', "no token"),
            ("huge", bytes(2 << 20), "more than"),
            ("good for ever so long", b'{"token": "a", "expires_in": 1e400}', "no token"),
        )
    ),
    Case(
        name="a token endpoint that stalls",
        make=lambda _: [wrong.stalls(TOKEN, after_bytes=3)],
        auth=Auth.TOKEN,
        error=RegistryError,
        word="stalls",
    ),
    Case(
        name="a token endpoint that is down",
        auth=Auth.TOKEN,
        options={"realm": "http://127.0.0.1:1/token"},
        error=RegistryError,
        word="refused",
        seconds=1,
    ),
]


@parametrize(PULLS)
def test_a_pull(case: Case, sample: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_pull(case, sample, tmp_path, monkeypatch)
