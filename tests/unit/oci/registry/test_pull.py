# SPDX-License-Identifier: Apache-2.0
"""What comes of a pull when a registry misbehaves: right bytes, or an error that says so, in time.

Each row of the table is one misbehaviour.
"""

import json
from pathlib import Path

import pytest

from oci import media_types
from rekindle.errors import (
    CredentialsError,
    FormatError,
    IntegrityError,
    NotFoundError,
    RegistryError,
)
from tests.samples.pulls import assert_pause, check_pull, each_byte_once, junk
from tests.samples.registry import (
    Case,
    Sample,
    parametrize,
    times_asked,
)
from tests.servers.registry import misbehaviour as wrong
from tests.servers.registry.misbehaviour import ANYTHING, blob, manifest
from tests.servers.registry.wire import Kind

pytestmark = pytest.mark.usefixtures("small_stretches")

PULLS = [
    Case(name="nothing is wrong", look=each_byte_once),
    # Content.
    Case(
        name="wrong bytes",
        make=lambda s: [wrong.wrong_bytes(s.big.digest)],
        error=IntegrityError,
        word="does not match its digest",
    ),
    Case(
        name="wrong bytes, first",
        make=lambda s: [wrong.wrong_bytes(s.big.digest, at=0)],
        error=IntegrityError,
        word="does not match its digest",
    ),
    Case(
        name="wrong bytes, small",
        make=lambda s: [wrong.wrong_bytes(s.small.digest)],
        error=IntegrityError,
        word="does not match its digest",
    ),
    Case(
        name="too many bytes",
        make=lambda s: [wrong.too_many_bytes(s.big.digest)],
        error=RegistryError,
        word="it sends",
    ),
    Case(
        name="too many bytes, small",
        make=lambda s: [wrong.too_many_bytes(s.small.digest)],
        error=RegistryError,
        word="should have 1000",
    ),
    Case(
        name="too many bytes in chunks",
        make=lambda s: [wrong.chunked(blob()), wrong.too_many_bytes(s.small.digest)],
        error=IntegrityError,
        word="longer",
    ),
    Case(
        name="too many bytes in chunks, no ranges",
        make=lambda s: [wrong.chunked(blob()), wrong.ignores_range(), wrong.too_many_bytes(s.big.digest)],
    ),  # what was to come has come by then, and is right
    Case(
        name="too few bytes",
        make=lambda s: [wrong.too_few_bytes(s.big.digest)],
        error=RegistryError,
        word="it sends",
    ),
    Case(
        name="too few bytes, small",
        make=lambda s: [wrong.too_few_bytes(s.small.digest)],
        error=RegistryError,
        word="should have 1000",
    ),
    Case(
        name="too few bytes in chunks",
        make=lambda s: [wrong.chunked(blob()), wrong.too_few_bytes(s.small.digest)],
        error=RegistryError,
        word="416",
    ),
    Case(name="in chunks", make=lambda _: [wrong.chunked(ANYTHING)], look=each_byte_once),
    Case(name="gzip", make=lambda _: [wrong.gzipped(blob())], error=RegistryError, word="encoded as gzip"),
    Case(
        name="another manifest under a digest",
        make=lambda s: [wrong.other_manifest(s.manifest.digest, s.content(s.manifest) + b" ")],
        error=IntegrityError,
        word="other bytes",
    ),
    Case(
        name="another manifest under the digest asked for",
        make=lambda s: [wrong.other_manifest(s.root.digest, b"{}")],
        reference="a/b@ROOT",
        error=IntegrityError,
        word="another manifest",
    ),
    Case(
        name="a manifest that is not that of its header",
        make=lambda _: [wrong.other_manifest("1", b"{}")],
        error=IntegrityError,
        word="another manifest",
    ),
    Case(name="a manifest that is no JSON", make=junk(b"\0nonsense"), error=FormatError, word="not JSON"),
    Case(name="a manifest that is a list", make=junk(b"[]"), error=FormatError, word="object"),
    Case(name="a manifest nested deeply", make=junk(b"[" * 100_000), error=FormatError, word="not JSON"),
    Case(
        name="a manifest of another type",
        make=junk(json.dumps({"mediaType": media_types.INDEX}).encode()),
        error=FormatError,
        word="something else",
    ),
    Case(
        name="a page for people",
        make=lambda _: [
            wrong.answers(manifest("1"), b"<html>sign in</html>", headers={"Content-Type": "text/html"})
        ],
        error=FormatError,
        word="not JSON",
    ),
    Case(
        name="a manifest of no type",
        make=lambda _: [wrong.answers(manifest("1"), b"{}", headers={"Content-Type": "text/plain"})],
        error=FormatError,
        word="not an image",
    ),
    Case(
        name="a huge manifest",
        make=junk(bytes(5 << 20)),
        error=RegistryError,
        word="more than",
    ),
    Case(
        name="a huge manifest in chunks",
        make=lambda s: [wrong.chunked(manifest()), *junk(bytes(5 << 20))(s)],
        error=RegistryError,
        word="more than",
    ),
    Case(
        name="a manifest below that is longer than said",
        make=lambda s: [wrong.other_manifest(s.manifest.digest, bytes(1 << 20))],
        error=RegistryError,
        word="more than",
    ),
    Case(
        name="a huge header",
        make=lambda _: [wrong.header(manifest(), "X-Huge", "x" * 70_000)],
        error=RegistryError,
        word="cannot be reached",
    ),
    Case(
        name="a huge header of a blob",
        make=lambda s: [wrong.header(blob(s.big.digest), "X-Huge", "x" * 70_000, times=1)],
    ),
    Case(
        name="the tag moves",
        make=lambda _: [wrong.tag_moves("1", f"sha256:{0:064}", method="GET")],
    ),
    # Statuses.
    Case(
        name="403 for the manifest",
        make=lambda _: [wrong.status(403, on=manifest())],
        error=CredentialsError,
        word="does not allow",
        seconds=0.5,
        look=times_asked(1, Kind.MANIFEST),
    ),
    Case(
        name="403 for a blob",
        make=lambda s: [wrong.status(403, on=blob(s.big.digest))],
        error=CredentialsError,
        word="does not allow",
        seconds=1,
    ),
    Case(
        name="404 for the manifest",
        make=lambda _: [wrong.status(404, on=manifest())],
        error=NotFoundError,
        word="NAME_UNKNOWN",
        seconds=0.5,
        look=times_asked(1, Kind.MANIFEST),
    ),
    Case(
        name="404 for a blob",
        make=lambda s: [wrong.status(404, on=blob(s.small.digest))],
        error=NotFoundError,
        word="does not have what was asked for",
        seconds=1,
    ),
    Case(name="500 twice", make=lambda _: [wrong.status(500, on=blob(), times=2)]),
    Case(
        name="502 with a page",
        make=lambda _: [wrong.answers(manifest(), b"<html>bad gateway</html>", code=502)],
        error=RegistryError,
        word="502",
        look=times_asked(3, Kind.MANIFEST),
    ),
    Case(
        name="500 for ever",
        make=lambda s: [wrong.status(500, on=blob(s.small.digest))],
        error=RegistryError,
        word="500",
    ),
    Case(name="418", make=lambda _: [wrong.status(418, on=manifest())], error=RegistryError, word="418"),
    Case(name="429", make=lambda _: [wrong.status(429, on=ANYTHING, times=2)]),
    Case(
        name="429 with seconds",
        make=lambda _: [wrong.status(429, on=manifest(), retry_after=1, times=1)],
        look=lambda r, _: assert_pause(r, 1.0),
    ),
    Case(
        name="503 with a date",
        make=lambda _: [wrong.status(503, on=manifest(), retry_after=wrong.http_date(2), times=1)],
        seconds=4,
        look=lambda r, _: assert_pause(r, 0.5),
    ),
    Case(
        name="503 with a date that has passed",
        make=lambda _: [wrong.status(503, on=manifest(), retry_after=wrong.http_date(-60), times=1)],
        seconds=1,
    ),
    Case(
        name="429 that asks for an hour",
        make=lambda _: [wrong.status(429, on=manifest(), retry_after=3600)],
        error=RegistryError,
        word="asks clients to retry after 3600 s",
        seconds=0.5,
        look=times_asked(1, Kind.MANIFEST),
    ),
    Case(
        name="429 that asks for ages",
        make=lambda _: [wrong.status(429, on=blob(), retry_after="9" * 5000)],
        error=RegistryError,
        word="retry after",
        seconds=1,
    ),
    Case(
        name="429 that asks for nonsense",
        make=lambda _: [wrong.status(429, on=manifest(), retry_after="soon", times=1)],
        seconds=1,
    ),
    Case(
        name="429 of the storage",
        make=lambda _: [
            wrong.redirects(blob()),
            wrong.status(429, on=blob(elsewhere=True), retry_after=1, times=1),
        ],
    ),
]


@parametrize(PULLS)
def test_a_pull(case: Case, sample: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_pull(case, sample, tmp_path, monkeypatch)
