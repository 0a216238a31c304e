# SPDX-License-Identifier: Apache-2.0
"""The registries that other tests trust: one half of these tests is asked of the real one too."""

import base64
import http.client
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.conftest import CRANE, ORAS, SKOPEO
from tests.servers.registry import misbehaviour as wrong
from tests.servers.registry.access import PASSWORD, USERNAME, Auth
from tests.servers.registry.docker_registry import DockerRegistry
from tests.servers.registry.misbehaviour import On, blob, manifest, upload
from tests.servers.registry.simulator import EMPTY, INDEX, MANIFEST, Registry, digest_of
from tests.servers.registry.wire import Kind

BASIC = "Basic " + base64.b64encode(f"{USERNAME}:{PASSWORD}".encode()).decode()
LAYER = bytes(range(256)) * 1000


@dataclass(slots=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes


class Client:
    """Plain http.client, one connection, no cleverness."""

    def __init__(self, host: str) -> None:
        self._connection = http.client.HTTPConnection(host, timeout=10)
        self.headers: dict[str, str] = {}

    def __call__(self, method: str, path: str, body: object = None, **headers: str) -> Reply:
        named = self.headers | {name.replace("_", "-"): value for name, value in headers.items()}
        target = urlsplit(path)
        path = f"{target.path}?{target.query}" if target.query else target.path
        self._connection.request(method, path, body, named)  # type: ignore[arg-type]
        response = self._connection.getresponse()
        with response:
            return Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())

    def upload(self, repository: str, data: bytes) -> Reply:
        location = self("POST", f"/v2/{repository}/blobs/uploads/").headers["location"]
        joint = "&" if "?" in location else "?"
        return self("PUT", f"{location}{joint}digest={digest_of(data)}", data)

    def image(self, repository: str, reference: str, *layers: bytes, **more: object) -> Reply:
        content = image(*layers, **more)
        for data in (b"{}", *layers):
            assert self.upload(repository, data).status == 201
        return self("PUT", f"/v2/{repository}/manifests/{reference}", content, Content_Type=MANIFEST)

    def close(self) -> None:
        self._connection.close()


def image(*layers: bytes, **more: object) -> bytes:
    def descriptor(data: bytes, media_type: str) -> dict[str, object]:
        return {"mediaType": media_type, "digest": digest_of(data), "size": len(data)}

    fields: dict[str, object] = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": descriptor(b"{}", EMPTY),
        "layers": [descriptor(layer, "application/octet-stream") for layer in layers],
    }
    return json.dumps(fields | more).encode()


@pytest.fixture
def connect() -> Iterator[Callable[[str], Client]]:
    clients: list[Client] = []

    def connect(host: str) -> Client:
        clients.append(Client(host))
        return clients[-1]

    yield connect
    for client in clients:
        client.close()


@pytest.fixture
def simulator() -> Iterator[Registry]:
    with Registry() as registry:
        yield registry


@pytest.fixture(params=["simulator", pytest.param("docker_registry", marks=pytest.mark.registry)])
def client(request: pytest.FixtureRequest, connect: Callable[[str], Client]) -> Client:
    """Of the simulator and of the real registry: both must answer the same."""
    return connect(request.getfixturevalue(request.param).host)


# What both do


def test_a_blob_that_was_uploaded_is_there(client: Client) -> None:
    digest = digest_of(LAYER)
    path = f"/v2/a/b/blobs/{digest}"
    assert client("HEAD", path).status == 404
    assert json.loads(client("GET", path).body)["errors"][0]["code"] in ("BLOB_UNKNOWN", "NAME_UNKNOWN")
    done = client.upload("a/b", LAYER)
    assert done.status == 201
    assert done.headers["docker-content-digest"] == digest
    assert urlsplit(done.headers["location"]).path == path
    head, got = client("HEAD", path), client("GET", path)
    assert head.status == got.status == 200
    assert (head.body, got.body) == (b"", LAYER)
    assert head.headers["content-length"] == got.headers["content-length"] == str(len(LAYER))
    assert got.headers["docker-content-digest"] == digest
    assert client("DELETE", path).status == 202
    assert client("GET", path).status == 404


def test_an_upload_of_other_bytes_is_refused(client: Client) -> None:
    location = client("POST", "/v2/a/b/blobs/uploads/").headers["location"]
    joint = "&" if "?" in location else "?"
    done = client("PUT", f"{location}{joint}digest={digest_of(b'other')}", LAYER)
    assert done.status == 400
    assert json.loads(done.body)["errors"][0]["code"] == "DIGEST_INVALID"


def test_an_upload_in_chunks(client: Client) -> None:
    location = client("POST", "/v2/a/b/blobs/uploads/").headers["location"]
    middle = len(LAYER) // 2
    step = client("PATCH", location, LAYER[:middle], Content_Range=f"0-{middle - 1}")
    assert (step.status, step.headers["range"]) == (202, f"0-{middle - 1}")
    where = client("GET", step.headers["location"])
    assert (where.status, where.headers["range"]) == (204, f"0-{middle - 1}")
    # A body that is an iterator goes out in chunks of transfer encoding, without a length.
    step = client("PATCH", step.headers["location"], iter([LAYER[middle:-10], LAYER[-10:]]))
    location = step.headers["location"]
    joint = "&" if "?" in location else "?"
    assert client("PUT", f"{location}{joint}digest={digest_of(LAYER)}").status == 201
    assert client("GET", f"/v2/a/b/blobs/{digest_of(LAYER)}").body == LAYER


@pytest.mark.parametrize(
    ("asked", "start", "stop"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=10-19", 10, 20),
        ("bytes=255990-", 255990, 256000),
        ("bytes=-5", 255995, 256000),
    ],
)
def test_a_range_is_served(client: Client, asked: str, start: int, stop: int) -> None:
    client.upload("a/b", LAYER)
    got = client("GET", f"/v2/a/b/blobs/{digest_of(LAYER)}", Range=asked)
    assert got.status == 206
    assert got.headers["content-range"] == f"bytes {start}-{stop - 1}/{len(LAYER)}"
    assert got.body == LAYER[start:stop]


def test_a_range_that_is_not_there(client: Client) -> None:
    client.upload("a/b", LAYER)
    got = client("GET", f"/v2/a/b/blobs/{digest_of(LAYER)}", Range=f"bytes={len(LAYER)}-")
    assert (got.status, got.headers["content-range"]) == (416, f"bytes */{len(LAYER)}")


def test_a_blob_is_mounted_from_where_it_is(client: Client) -> None:
    client.upload("a/b", LAYER)
    digest = digest_of(LAYER)
    assert client("POST", f"/v2/c/blobs/uploads/?mount={digest}&from=a/b").status == 201
    assert client("GET", f"/v2/c/blobs/{digest}").body == LAYER
    begun = client("POST", f"/v2/d/blobs/uploads/?mount={digest}&from=nowhere")
    assert begun.status == 202
    assert begun.headers["location"]


def test_a_manifest_by_tag_and_by_digest(client: Client) -> None:
    content = image(LAYER)
    digest = digest_of(content)
    done = client.image("a/b", "1.0", LAYER)
    assert (done.status, done.headers["docker-content-digest"]) == (201, digest)
    for method in ("GET", "HEAD"):
        for reference in ("1.0", digest):
            got = client(method, f"/v2/a/b/manifests/{reference}", Accept=f"{INDEX}, {MANIFEST};q=0.9")
            assert (got.status, got.headers["docker-content-digest"]) == (200, digest)
            assert got.headers["content-type"] == MANIFEST
            assert got.headers["content-length"] == str(len(content))
            assert got.body == (content if method == "GET" else b"")
    assert client("GET", "/v2/a/b/manifests/2.0", Accept=MANIFEST).status == 404
    assert client("GET", "/v2/a/b/manifests/1.0", Accept="text/plain").status == 404
    assert json.loads(client("GET", "/v2/a/b/tags/list").body) == {"name": "a/b", "tags": ["1.0"]}
    assert client("DELETE", f"/v2/a/b/manifests/{digest}").status == 202
    assert client("HEAD", f"/v2/a/b/manifests/{digest}", Accept=MANIFEST).status == 404


def test_manifests_that_are_refused(client: Client) -> None:
    client.image("a/b", "1", LAYER)
    put = "/v2/a/b/manifests"
    assert client("PUT", f"{put}/{digest_of(b'other')}", image(LAYER), Content_Type=MANIFEST).status == 400
    assert client("PUT", f"{put}/2", b"not JSON", Content_Type=MANIFEST).status == 400
    missing = client("PUT", f"{put}/2", image(b"not there"), Content_Type=MANIFEST)
    assert missing.status == 400
    assert json.loads(missing.body)["errors"][0]["code"] == "MANIFEST_BLOB_UNKNOWN"


# Who may


def ask_for_a_token(client: Client, challenge: str, **headers: str) -> Reply:
    fields = dict(word.split("=", 1) for word in challenge.removeprefix("Bearer ").split('",'))
    realm, service, scope = (fields[name].strip('"') for name in ("realm", "service", "scope"))
    return client("GET", f"{realm}?service={service}&scope={scope}", **headers)


@pytest.mark.parametrize("kind", ["simulator", pytest.param("docker_registry", marks=pytest.mark.registry)])
@pytest.mark.parametrize("auth", [Auth.BASIC, Auth.TOKEN])
def test_who_has_the_password_comes_in(
    kind: str, auth: Auth, connect: Callable[[str], Client], request: pytest.FixtureRequest
) -> None:
    if kind == "simulator":
        registry = Registry(auth=auth)
        request.addfinalizer(registry.close)
        host = registry.host
    else:
        host = request.getfixturevalue("start_docker_registry")(auth).host
    client = connect(host)
    refused = client("POST", "/v2/a/b/blobs/uploads/")
    assert refused.status == 401
    challenge = refused.headers["www-authenticate"]
    if auth is Auth.BASIC:
        assert challenge.startswith("Basic realm=")
        client.headers["Authorization"] = "Basic " + base64.b64encode(b"user:wrong").decode()
        assert client("GET", "/v2/").status == 401
        client.headers["Authorization"] = BASIC
    else:
        tokens = connect(urlsplit(challenge.split('"')[1]).netloc)
        assert ask_for_a_token(tokens, challenge).status == 401
        token = json.loads(ask_for_a_token(tokens, challenge, Authorization=BASIC).body)["token"]
        client.headers["Authorization"] = f"Bearer {token}"
        form = f"grant_type=password&username={USERNAME}&password={PASSWORD.replace(' ', '+')}"
        form += "&client_id=tests&service=docker-registry&scope=repository:a/b:pull"
        posted = tokens("POST", "/token", form, Content_Type="application/x-www-form-urlencoded")
        assert json.loads(posted.body)["access_token"]
        other = client("POST", "/v2/c/blobs/uploads/")
        assert other.status == 401
        assert "insufficient_scope" in other.headers["www-authenticate"]
    assert client.image("a/b", "1", LAYER).status == 201
    assert client("GET", "/v2/a/b/manifests/1", Accept=MANIFEST).status == 200


def test_who_has_no_password_may_read_where_that_is_allowed(connect: Callable[[str], Client]) -> None:
    with Registry(auth=Auth.TOKEN, anonymous_pull=True) as registry:
        registry.add_image("a/b", "1", LAYER)
        client = connect(registry.host)
        token = json.loads(client("GET", "/token?service=x&scope=repository:a/b:pull,push").body)["token"]
        client.headers["Authorization"] = f"Bearer {token}"
        assert client("GET", "/v2/a/b/manifests/1").status == 200
        assert client("POST", "/v2/a/b/blobs/uploads/").status == 401


def test_the_token_server_may_be_one_that_is_not_there(connect: Callable[[str], Client]) -> None:
    with Registry(auth=Auth.TOKEN, realm="http://127.0.0.1:1/token") as registry:
        refused = connect(registry.host)("GET", "/v2/")
        assert 'realm="http://127.0.0.1:1/token"' in refused.headers["www-authenticate"]
        registry.misbehave(wrong.status(503, on=wrong.TOKEN, times=1), wrong.answers(wrong.TOKEN, b"<html>"))
        client = connect(registry.host)
        assert client("GET", "/token").status == 503
        assert client("GET", "/token").body == b"<html>"


# What the real one has not, or does otherwise


def test_referrers(simulator: Registry, connect: Callable[[str], Client]) -> None:
    client = connect(simulator.host)
    subject = {"mediaType": MANIFEST, "digest": simulator.add_image("a/b", "1", LAYER), "size": 1}
    path = f"/v2/a/b/referrers/{subject['digest']}"
    empty = client("GET", path)
    assert (empty.status, empty.headers["content-type"]) == (200, INDEX)
    assert json.loads(empty.body)["manifests"] == []
    about = {"subject": subject, "artifactType": "text/x", "annotations": {"a": "b"}}
    done = client.image("a/b", digest_of(image(b"signature", **about)), b"signature", **about)
    assert (done.status, done.headers["oci-subject"]) == (201, subject["digest"])
    simulator.add_image("a/b", None, b"other", subject=subject)
    found = json.loads(client("GET", path).body)["manifests"]
    assert {f["artifactType"] for f in found} == {"text/x", EMPTY}
    some = client("GET", f"{path}?artifactType=text/x")
    assert some.headers["oci-filters-applied"] == "artifactType"
    assert json.loads(some.body)["manifests"] == [
        {
            "mediaType": MANIFEST,
            "digest": done.headers["docker-content-digest"],
            "size": len(image(b"signature", **about)),
            "artifactType": "text/x",
            "annotations": {"a": "b"},
        }
    ]
    assert client("GET", "/v2/a/b/referrers/nonsense").status == 400


def test_tags_come_sorted_and_in_pages(simulator: Registry, connect: Callable[[str], Client]) -> None:
    for tag in ("c", "a", "b"):
        simulator.add_image("a/b", tag, LAYER)
    client = connect(simulator.host)
    first = client("GET", "/v2/a/b/tags/list?n=2")
    assert json.loads(first.body)["tags"] == ["a", "b"]
    link, _, rel = first.headers["link"].partition(";")
    assert rel.strip() == 'rel="next"'
    second = client("GET", link.strip("<>"))
    assert json.loads(second.body)["tags"] == ["c"]
    assert "link" not in second.headers
    assert client("GET", "/v2/nowhere/tags/list").status == 404


def test_a_chunk_that_leaves_a_gap_is_refused(simulator: Registry, connect: Callable[[str], Client]) -> None:
    client = connect(simulator.host)
    step = client("PATCH", client("POST", "/v2/a/b/blobs/uploads/").headers["location"], b"0123456789")
    gap = client("PATCH", step.headers["location"], b"x", Content_Range="15-15")
    assert (gap.status, gap.headers["range"]) == (416, "0-9")


def test_a_blob_in_a_single_post(simulator: Registry, connect: Callable[[str], Client]) -> None:
    client = connect(simulator.host)
    done = client("POST", f"/v2/a/b/blobs/uploads/?digest={digest_of(LAYER)}", LAYER)
    assert done.status == 201
    assert client("GET", done.headers["location"]).body == LAYER
    assert [r.method for r in simulator.uploads(digest_of(LAYER))] == ["POST"]


def test_all_is_counted(simulator: Registry, connect: Callable[[str], Client], tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(LAYER)
    digest = simulator.add_blob("a/b", tmp_path / "blob")
    client = connect(simulator.host)
    client("GET", f"/v2/a/b/blobs/{digest}", Range="bytes=0-9")
    client("GET", f"/v2/a/b/blobs/{digest}", X_Mark="1")
    client.upload("c", LAYER)
    assert [(r.status, r.sent_bytes) for r in simulator.downloads(digest)] == [(206, 10), (200, len(LAYER))]
    assert simulator.downloads()[1].headers["x-mark"] == "1"
    assert [(r.repository, r.body_bytes) for r in simulator.uploads(digest)] == [("c", len(LAYER))]
    assert simulator.received_bytes == len(LAYER)
    assert simulator.most_at_once == 1


# What it does wrong, if told


def test_a_misbehaviour_is_for_what_it_names_and_as_often_as_it_says(
    connect: Callable[[str], Client],
) -> None:
    with Registry() as registry:
        digest, other = registry.add_blob("a/b", LAYER), registry.add_blob("a/b", b"other")
        registry.misbehave(
            wrong.status(503, on=blob(digest), retry_after=7, times=2, skip=1),
            wrong.wrong_bytes(digest),
        )
        client = connect(registry.host)
        replies = [client("GET", f"/v2/a/b/blobs/{digest}") for _ in range(4)]
        assert [r.status for r in replies] == [200, 503, 503, 200]
        assert replies[1].headers["retry-after"] == "7"
        assert len(replies[3].body) == len(LAYER)
        assert replies[3].body != LAYER
        assert client("GET", f"/v2/a/b/blobs/{other}").body == b"other"
        registry.behave()
        assert client("GET", f"/v2/a/b/blobs/{digest}").body == LAYER


def reply_of(client: Client, path: str, **headers: str) -> Reply | type[Exception]:
    try:
        return client("GET", path, **headers)
    except (OSError, http.client.HTTPException) as problem:
        client.close()
        return type(problem)


@pytest.mark.parametrize(
    ("misbehaviour", "problem"),
    [
        (wrong.closes(blob(), times=1), http.client.RemoteDisconnected),
        (wrong.closes(blob(), after_bytes=100, times=1), http.client.IncompleteRead),
        (wrong.resets(blob(), after_bytes=100, times=1), ConnectionResetError),
        (wrong.stalls(blob(), times=1), TimeoutError),
        (wrong.stalls(blob(), after_bytes=-1, times=1), TimeoutError),
        (wrong.slow(blob(), times=1), TimeoutError),
        (wrong.content_length(blob(), 5, times=1), http.client.IncompleteRead),
        (wrong.restarts(blob(), times=1), http.client.RemoteDisconnected),
    ],
)
def test_connections_that_break(
    misbehaviour: wrong.Misbehaviour, problem: type[Exception], connect: Callable[[str], Client]
) -> None:
    with Registry(misbehave=[misbehaviour]) as registry:
        path = f"/v2/a/b/blobs/{registry.add_blob('a/b', LAYER)}"
        client = connect(registry.host)
        client._connection.timeout = 0.5
        assert reply_of(client, path) is problem
        deadline = time.monotonic() + 5
        while (reply := reply_of(client, path)) is ConnectionRefusedError:
            assert time.monotonic() < deadline
        assert isinstance(reply, Reply)
        assert reply.body == LAYER


def test_an_upload_that_breaks(connect: Callable[[str], Client]) -> None:
    with Registry(misbehave=[wrong.resets(upload(), after_bytes=1000, times=1)]) as registry:
        client = connect(registry.host)
        with pytest.raises(ConnectionError):
            client.upload("a/b", LAYER * 40)
        client.close()
        assert client.upload("a/b", LAYER * 40).status == 201
        first, second = registry.uploads()
        assert (first.status, second.status) == (None, 201)
        assert first.body_bytes == 1000


def test_redirects_lead_to_another_host_and_may_expire(connect: Callable[[str], Client]) -> None:
    with Registry(misbehave=[wrong.redirects(blob(), 302, expired=1)]) as registry:
        path = f"/v2/a/b/blobs/{registry.add_blob('a/b', LAYER)}"
        client, elsewhere = connect(registry.host), connect(registry.elsewhere)
        first, second = client("GET", path), client("GET", path)
        assert (first.status, second.status) == (302, 302)
        assert urlsplit(first.headers["location"]).netloc == registry.elsewhere
        assert elsewhere("GET", first.headers["location"]).status == 403
        assert elsewhere("GET", first.headers["location"]).status == 403
        assert elsewhere("GET", second.headers["location"]).body == LAYER
        assert registry.leaks == []
        assert elsewhere("GET", second.headers["location"], Authorization=BASIC).status == 400
        assert len(registry.leaks) == 1


def test_ranges_that_are_not_what_was_asked(connect: Callable[[str], Client]) -> None:
    with Registry() as registry:
        path = f"/v2/a/b/blobs/{registry.add_blob('a/b', LAYER)}"
        client = connect(registry.host)
        registry.misbehave(wrong.ignores_range())
        whole = client("GET", path, Range="bytes=10-19")
        assert (whole.status, whole.body) == (200, LAYER)
        for lie, said in ((True, "bytes 10-19/256000"), (False, "bytes 20-29/256000")):
            registry.behave()
            registry.misbehave(
                wrong.another_range(blob(), lambda r: range(r.start + 10, r.stop + 10), lie=lie)
            )
            other = client("GET", path, Range="bytes=10-19")
            assert (other.status, other.headers["content-range"], other.body) == (206, said, LAYER[20:30])


def test_tokens_that_expire(connect: Callable[[str], Client]) -> None:
    with Registry(auth=Auth.TOKEN, misbehave=[wrong.tokens_expire(after=2)]) as registry:
        digest = registry.add_blob("a/b", LAYER)
        client = connect(registry.host)
        for _ in range(2):
            token = json.loads(client("GET", "/token?scope=repository:a/b:pull", Authorization=BASIC).body)[
                "token"
            ]
            bearer = {"Authorization": f"Bearer {token}"}
            replies = [client("GET", f"/v2/a/b/blobs/{digest}", **bearer) for _ in range(3)]
            assert [r.status for r in replies] == [200, 200, 401]
            assert 'error="invalid_token"' in replies[2].headers["www-authenticate"]


@pytest.mark.parametrize("form", ["relative", "absolute", "query", "elsewhere"])
def test_locations_of_uploads(form: str, connect: Callable[[str], Client]) -> None:
    with Registry(misbehave=[wrong.upload_location(form)]) as registry:
        client, elsewhere = connect(registry.host), connect(registry.elsewhere)
        location = client("POST", "/v2/a/b/blobs/uploads/").headers["location"]
        joint = "&" if "?" in location else "?"
        there = elsewhere if form == "elsewhere" else client
        assert there("PUT", f"{location}{joint}digest={digest_of(LAYER)}", LAYER).status == 201
        assert client("GET", f"/v2/a/b/blobs/{digest_of(LAYER)}").body == LAYER


def test_manifests_that_lie(connect: Callable[[str], Client]) -> None:
    with Registry() as registry:
        first, second = (registry.add_image("a/b", "1", layer) for layer in (b"one", b"two"))
        client = connect(registry.host)
        registry.misbehave(wrong.tag_moves("1", first), wrong.other_manifest(second, b"\0nonsense"))
        seen = [client("HEAD", "/v2/a/b/manifests/1").headers["docker-content-digest"] for _ in range(2)]
        assert seen == [second, first]
        got = client("GET", f"/v2/a/b/manifests/{second}")
        assert (got.headers["docker-content-digest"], got.body) == (second, b"\0nonsense")
        registry.behave()
        registry.misbehave(wrong.status(405, on=manifest(None, "HEAD")), wrong.no_referrers())
        assert client("HEAD", "/v2/a/b/manifests/1").status == 405
        assert client("GET", "/v2/a/b/manifests/1").status == 200
        assert client("GET", f"/v2/a/b/referrers/{first}").status == 404
        registry.behave()
        registry.misbehave(wrong.lying_referrers(registry, "a/b", first))
        [found] = json.loads(client("GET", f"/v2/a/b/referrers/{second}").body)["manifests"]
        assert found["digest"] == first
        registry.behave()
        registry.misbehave(*wrong.web_page())
        answer = client("GET", f"/v2/a/b/referrers/{second}")
        assert answer.status == 303
        assert b"<html>" in connect(registry.elsewhere)("GET", answer.headers["location"]).body


def test_a_failure_may_come_after_the_deed(connect: Callable[[str], Client]) -> None:
    with Registry(misbehave=[wrong.fails_after(upload(), times=1), wrong.ignores_mounts()]) as registry:
        client = connect(registry.host)
        assert client.upload("a/b", LAYER).status == 500
        assert client("HEAD", f"/v2/a/b/blobs/{digest_of(LAYER)}").status == 200
        assert client("POST", f"/v2/c/blobs/uploads/?mount={digest_of(LAYER)}&from=a/b").status == 202


@pytest.mark.parametrize("misbehaviour", [wrong.chunked(On(kind=Kind.BLOB)), wrong.gzipped(blob())])
def test_encodings(misbehaviour: wrong.Misbehaviour, connect: Callable[[str], Client]) -> None:
    with Registry(misbehave=[misbehaviour]) as registry:
        client = connect(registry.host)
        digest = registry.add_blob("a/b", LAYER * 20)
        for _ in range(2):
            got = client("GET", f"/v2/a/b/blobs/{digest}")
            if "content-encoding" in got.headers:
                assert len(got.body) < len(LAYER)
            else:
                assert "content-length" not in got.headers
                assert got.body == LAYER * 20


def test_each_request_has_its_rate(connect: Callable[[str], Client]) -> None:
    with Registry(rate_bytes_per_second=len(LAYER) * 5) as registry:
        client = connect(registry.host)
        works: list[Callable[[], Reply]] = [
            lambda: client.upload("a/b", LAYER),
            lambda: client("GET", f"/v2/a/b/blobs/{digest_of(LAYER)}"),
        ]
        for work in works:
            started = time.monotonic()
            assert work().status in (200, 201)
            assert 0.15 < time.monotonic() - started < 1


# What others make of it


def quietly(*words: object, where: Path) -> str:
    done = subprocess.run(
        [str(word) for word in words],
        cwd=where,
        env={"HOME": str(where)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.registry
@pytest.mark.parametrize("auth", [Auth.NONE, Auth.BASIC, Auth.TOKEN])
def test_others_can_use_the_simulator(auth: Auth, tmp_path: Path) -> None:
    (tmp_path / "hello.txt").write_text("hello")
    (tmp_path / "signature.txt").write_text("signature")
    login = [] if auth is Auth.NONE else ["--username", USERNAME, "--password", PASSWORD]
    with Registry(auth=auth) as registry:
        image = f"{registry.host}/a/b:1"
        flags = ["--plain-http", *login]
        quietly(ORAS, "push", *flags, image, "hello.txt", where=tmp_path)
        quietly(
            *(ORAS, "attach", *flags, "--artifact-type", "text/x", image, "signature.txt"), where=tmp_path
        )
        assert "text/x" in quietly(ORAS, "discover", *flags, image, where=tmp_path)
        (tmp_path / "pulled").mkdir()
        quietly(ORAS, "pull", *flags, image, where=tmp_path / "pulled")
        assert (tmp_path / "pulled" / "hello.txt").read_text() == "hello"
        quietly(
            ORAS,
            "cp",
            "-r",
            *_both("--from", login),
            *_both("--to", login),
            image,
            f"{registry.host}/c:2",
            where=tmp_path,
        )
        assert registry.repositories["c"].tags["2"] == registry.repositories["a/b"].tags["1"]
        if auth is Auth.NONE:
            assert quietly(CRANE, "ls", "--insecure", f"{registry.host}/a/b", where=tmp_path) == "1\n"
            quietly(CRANE, "copy", "--insecure", image, f"{registry.host}/dd:3", where=tmp_path)


def _both(side: str, login: list[str]) -> list[str]:
    return [f"{side}-plain-http", *(f"{side}{word[1:]}" if word.startswith("--") else word for word in login)]


@pytest.mark.registry
@pytest.mark.parametrize("auth", Auth)
def test_the_real_registry_lets_in_who_has_the_password(
    auth: Auth, start_docker_registry: Callable[..., DockerRegistry], tmp_path: Path
) -> None:
    registry = start_docker_registry(auth)
    (tmp_path / "hello.txt").write_text("hello")
    flags = [] if auth is Auth.NONE else ["--username", USERNAME, "--password", PASSWORD]
    image = f"{registry.host}/a/b:1"
    quietly(ORAS, "push", "--plain-http", *flags, image, "hello.txt", where=tmp_path)
    assert '"layers"' in quietly(
        *(SKOPEO, "--insecure-policy", "inspect", "--raw", "--tls-verify=false"),
        *([] if auth is Auth.NONE else ["--creds", f"{USERNAME}:{PASSWORD}"]),
        f"docker://{image}",
        where=tmp_path,
    )
    if auth is Auth.NONE:
        assert quietly(CRANE, "ls", "--insecure", f"{registry.host}/a/b", where=tmp_path) == "1\n"
    assert "PUT /v2/a/b/manifests/1" in registry.log.read_text()
    assert (registry.storage / "docker/registry/v2/repositories/a/b").is_dir()


@pytest.mark.registry
@pytest.mark.parametrize("auth", [Auth.BASIC, Auth.TOKEN])
def test_the_real_registry_refuses_others(
    auth: Auth, start_docker_registry: Callable[..., DockerRegistry], tmp_path: Path
) -> None:
    registry = start_docker_registry(auth)
    (tmp_path / "hello.txt").write_text("hello")
    with pytest.raises(AssertionError, match=r"40[13]"):
        quietly(
            *(ORAS, "push", "--plain-http", "--username", USERNAME, "--password", "wrong"),
            *(f"{registry.host}/a/b:1", "hello.txt"),
            where=tmp_path,
        )
