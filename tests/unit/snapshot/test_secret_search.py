# SPDX-License-Identifier: Apache-2.0
"""KnownSecrets are found in a dump wherever they lie, and what only looks like one is not."""

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import hyperscan
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rekindle.errors import DumpError, SecretError, WorkloadError
from rekindle.secrets.forms import FORMS
from snapshot import secret_search
from snapshot.secret_search import KnownSecrets, require_no_secrets, search
from tests.samples.dump import BASE, ONE, PAGE, entry, mapping, write_dump
from tests.samples.gauges import memory_peak
from tests.samples.tokens import EVERY, TOKENS, drawn

KEY = "Zq8-vixen-41-Lark"


HARMLESS = [
    rb"hf_[a-zA-Z0-9]{34} ghp_[a-zA-Z0-9]{36} sk-[a-zA-Z0-9]{48} AKIA[0-9A-Z]{16}",
    b"AKIAIOSFODNN7EXAMPLE aws_secret_access_key=wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    b"hf_xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx hf_" + b"A" * 34 + b" ghp_" + b"x" * 36,
    b"hf_abcdefghijklmnopqrstuvwxyz12345678 sk-1234567890abcdef1234567890abcdef",
    b"hf_modeling_llama_attention_forward_with_cache hf_modelingllamaattentionforwardwithcache",
    b"task-sk-1 mask-scheduler-1234567890123456789012 sk-",
    b"sk-this-is-a-long-hyphenated-identifier-2 sk-linking-protocols-exception-1999-12-31-23-59",
    b"Asterisk-linking-protocols-exception-2b9d8a7c6e5f4 disk-a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6",
    b"-----BEGIN CERTIFICATE-----\nMIIDdzCCAl+gAwIBAgIEAgAAuTANBgkqhkiG9w0BAQUFADBaMQswCQYDVQQGEwJJ",
    b"-----BEGIN PRIVATE KEY-----\0-----BEGIN RSA PRIVATE KEY-----\n...\n-----END",
    b"-----BEGIN PRIVATE KEY-----\n(.*)\n-----END PRIVATE KEY-----",
    b"zAKIAQ3EXW5RT7YU2IOPAz AKIAQ3EXW5RT7YU2IOPAQQQQQ",
    b"AccountKey=<key>; SecretAccessKey: string AWS_SECRET_ACCESS_KEY=",
    b"glpat-xxxxxxxxxxxxxxxxxxxx npm_config_registry_and_other_settings_of_it npm_" + b"A" * 36,
    b"eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiIxMjM0NTY3ODkwIiwibmFtZSI6IkpvaG4gRG9lIiwiaWF0Ijox"
    b"NTE2MjM5MDIyfQ.SflKxwRJSMeKKF2QT4fwpMeJf36POk6yJV_adQssw5c",
    b"eyJhbGciOiJub25lIn0.eyJpc3MiOiJqb2UifQ. header.eyJ.sig eyJhbGciOiJIUzI1NiJ9",
    b"https://hooks.slack.com/services/T00000000/B00000000/XXXXXXXXXXXXXXXXXXXXXXXX",
    b"https://discord.com/api/webhooks/{webhook.id}/{webhook.token} https://discord.com/api/webhooks/123/abc",
    b"hvs.example_token_of_the_documentation sk_live_" + b"0" * 24 + b" pypi-AgENdGVzdC5weXBpLm9yZw",
]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The directory of a dump that holds a page of ones."""
    (tmp_path / "criu").mkdir()
    (tmp_path / "shm").mkdir()
    hold(tmp_path, ONE)
    return tmp_path


def hold(tree: Path, content: bytes) -> None:
    """Fills one stretch of memory, from its beginning."""
    content += bytes(-len(content) % PAGE)
    pages = len(content) // PAGE
    write_dump(tree / "criu", [mapping(BASE, BASE + pages * PAGE)], [entry(BASE, pages)], content)


def names(
    tree: Path,
    environment: Mapping[str, str] | None = None,
    argv: Sequence[str] = (),
    allow: Sequence[str] = (),
) -> list[str]:
    return [each.name for each in search(tree, KnownSecrets.of(environment or {}, argv, allow))]


@pytest.mark.parametrize(
    ("environment", "argv", "content", "name"),
    [
        ({"VLLM_API_KEY": KEY}, [], f"VLLM_API_KEY={KEY}\0", "VLLM_API_KEY"),
        ({"VLLM_API_KEY": KEY}, [], f"\1{KEY}\1", "VLLM_API_KEY"),
        ({"VLLM_API_KEY": "abc"}, [], "LANG=C\0VLLM_API_KEY=abc\0", "VLLM_API_KEY"),
        ({"DB_PASSWORD": "123456"}, [], "DB_PASSWORD=123456\0", "DB_PASSWORD"),
        ({"DB_PASSWORD": "aaaaaaaa"}, [], "DB_PASSWORD=aaaaaaaa\0", "DB_PASSWORD"),
        ({"HF_TOKEN": "/no/such/Secret9"}, [], "x/no/such/Secret9", "HF_TOKEN"),
        ({"A_KEY": "aB3" * 900}, [], "aB3" * 900, "A_KEY"),
        ({"MINIO_SECRET_KEY": KEY}, [], KEY, "MINIO_SECRET_KEY"),
        ({"SSH_KEY": "first\nthe longest line\nlast"}, [], "first\nthe longest line\n", "SSH_KEY"),
        ({"ANY": EVERY[0][1]}, [], EVERY[0][1], "ANY"),
        ({"DATABASE_URL": "postgres://me:oats77@db/x"}, [], "oats77", "DATABASE_URL"),
        ({"DATABASE_URL": "postgres://me:oa%3Ats77@db/x"}, [], "oa:ts77", "DATABASE_URL"),
        ({"DATABASE_URL": "postgres://me:oa/ts77@db/x"}, [], "oa/ts77", "DATABASE_URL"),
        ({"PASS_KEY": "schön geheim"}, [], "schön geheim", "PASS_KEY"),
        ({}, ["vllm", "--api-key", KEY], KEY, "--api-key"),
        ({}, ["vllm", "--api-key", "first-key", KEY, "--port", "8000"], KEY, "--api-key"),
        ({}, [f"--hf-token={KEY}"], KEY, "--hf-token"),
        ({}, ["--api-key", "abc"], "vllm\0--api-key\0abc\0", "--api-key"),
        ({}, ["--api-key=abc"], "vllm\0--api-key=abc\0", "--api-key"),
        ({}, ["--key", "aaaaaaaaaaaa"], "--key\0aaaaaaaaaaaa\0", "--key"),
        ({}, ["env", f"HF_TOKEN={KEY}", "serve"], KEY, "HF_TOKEN"),
        ({}, ["sh", "-c", f"HF_TOKEN={KEY} vllm serve m"], KEY, "HF_TOKEN"),
        ({}, ["sh", "-c", f"vllm serve --api-key '{KEY}' && x"], KEY, "--api-key"),
        ({}, ["sh", "-c", f"vllm serve --api-key {KEY}; echo"], KEY, "--api-key"),
        ({}, ["--db", "postgres://me:oats77@db/x"], "oats77", "--db"),
        ({}, ["--db=postgres://me:oats77@db/x"], "oats77", "--db"),
        ({}, ["serve", EVERY[0][1]], EVERY[0][1], "argument"),
    ],
)
def test_what_the_server_was_given_is_found(
    tree: Path, environment: dict[str, str], argv: list[str], content: str, name: str
) -> None:
    hold(tree, ONE + content.encode())
    assert name in names(tree, environment, argv)
    assert names(tree) == (["hugging-face-token"] if content.startswith("hf_") else [])


@pytest.mark.parametrize(
    ("environment", "argv", "content"),
    [
        ({"VLLM_API_KEY": "EMPTY"}, [], "VLLM_API_KEY=EMPTY\0"),
        ({"VLLM_API_KEY": ""}, [], "VLLM_API_KEY=\0"),
        ({"USE_TOKEN": "true"}, [], "USE_TOKEN=true\0"),
        ({"X_TOKEN_THRESHOLD": "1024"}, [], "X_TOKEN_THRESHOLD=1024\0"),
        ({"HF_TOKEN_PATH": "/x/y"}, [], "HF_TOKEN_PATH=/x/y\0"),
        ({"SSL_KEY": "/usr/bin/env"}, [], "SSL_KEY=/usr/bin/env\0"),
        (
            {"GPG_KEY": "A035C8C19219BA821ECEA86B64E628F8D684696D"},
            [],
            "A035C8C19219BA821ECEA86B64E628F8D684696D",
        ),
        ({"API_KEY": "abc"}, [], "abc API_KEY=abcd --api-key\0abc\0"),
        ({"PATH": "/usr/bin", "TOKENIZERS_PARALLELISM": "never"}, [], "/usr/bin never"),
        ({}, ["--return-tokens-as-token-ids", "org/model"], "org/model"),
        ({}, ["--enable-prompt-tokens-details", "org/model"], "org/model"),
        ({}, ["--max-num-batched-tokens", "819200"], "819200"),
        ({}, ["--ssl-keyfile", "/etc/ssl/mine"], "/etc/ssl/mine"),
        ({"URL": "http://host:8000/v1/models@main"}, [], "8000/v1/models"),
        ({}, ["--api-key", "abc"], "--api-key\0abcd\0 abc"),
    ],
)
def test_what_is_no_secret_is_not_looked_for(
    tree: Path, environment: dict[str, str], argv: list[str], content: str
) -> None:
    hold(tree, content.encode())
    assert names(tree, environment, argv) == []


def test_the_same_value_under_two_names_is_told_under_both(tree: Path) -> None:
    hold(tree, KEY.encode())
    assert names(tree, {"A_KEY": KEY, "B_KEY": KEY}) == ["A_KEY", "B_KEY"]
    assert names(tree, {"A_KEY": KEY, "B_KEY": KEY}, allow=["A_KEY"]) == []


@pytest.mark.parametrize("name", ["--api-key", "api-key", "API_KEY"])
def test_an_option_is_allowed_with_dashes_or_without(tree: Path, name: str) -> None:
    hold(tree, KEY.encode())
    assert names(tree, argv=["--api-key", KEY]) == ["--api-key"]
    assert names(tree, argv=["--api-key", KEY], allow=[name]) == []


def test_a_token_of_an_allowed_variable_is_allowed_and_another_is_not(tree: Path) -> None:
    one, two = TOKENS["hugging-face-token"][:2]
    hold(tree, one.encode() + b"\0tail" + one.encode() + b"\0")
    assert names(tree, {"HF_TOKEN": one}, allow=["HF_TOKEN"]) == []
    hold(tree, one.encode() + b"\0" + two.encode())
    assert names(tree, {"HF_TOKEN": one}, allow=["HF_TOKEN"]) == ["hugging-face-token"]
    assert names(tree, {"HF_TOKEN": one}, allow=["HF_TOKEN", "hugging-face-token"]) == []


def test_an_allowed_private_key_does_not_allow_another(tree: Path) -> None:
    one, two = (f"-----BEGIN PRIVATE KEY-----\n{drawn(64)}\n" for _ in range(2))
    hold(tree, one.encode() + b"\0" + two.encode())
    assert names(tree, {"TLS_KEY": one}, allow=["TLS_KEY"]) == ["private-key"]
    hold(tree, one.encode().replace(b"\n", b"\\n"))
    assert names(tree, {"TLS_KEY": one}, allow=["TLS_KEY"]) == []


@pytest.mark.parametrize(("name", "token"), EVERY)
def test_a_token_is_found_by_its_form(tree: Path, name: str, token: str) -> None:
    for around in ("\0{}\0", 'x="{}"', "Bearer {} and more", "\1{}\1"):
        hold(tree, around.format(token).encode())
        assert names(tree) == [name], around
    assert names(tree, allow=[name]) == []


@pytest.mark.parametrize("token", [TOKENS["api-key"][0], TOKENS["slack-token"][1], TOKENS["github-token"][0]])
def test_a_token_with_its_length_before_it_is_found(tree: Path, token: str) -> None:
    hold(tree, b"\xd9" + bytes([len(token)]) + token.encode() + b"\xa1")
    assert len(names(tree)) == 1


@pytest.mark.parametrize("content", HARMLESS)
def test_examples_regexes_and_identifiers_are_no_tokens(tree: Path, content: bytes) -> None:
    hold(tree, content)
    assert names(tree) == []


@given(st.binary(max_size=2000), st.sampled_from(EVERY))
@settings(max_examples=200)
def test_any_bytes_can_stand_around_a_token(noise: bytes, each: tuple[str, str]) -> None:
    name, token = each
    form = next(form for form in FORMS if form.name == name)
    content = noise + b"\0" + token.encode() + b"\0" + noise
    starts = [content.find(anchor, len(noise)) for anchor in form.anchors]
    assert any(form.token_at(content, start) for start in starts if start >= 0)


@pytest.mark.parametrize("offset", [PAGE - 1, PAGE - 8, PAGE - len(KEY) + 1, 5 * PAGE - 3, 9 * PAGE - 17])
def test_a_secret_across_pages_is_found(tree: Path, offset: int) -> None:
    hold(tree, b"\1" * offset + KEY.encode() + b"\1" * PAGE)
    assert names(tree, {"A_KEY": KEY}) == ["A_KEY"]


@pytest.mark.parametrize("before", [0, 1, 8, 16, 17, 18, 40, 600, 1024, 1025])
@pytest.mark.parametrize("value", [KEY, TOKENS["api-key"][1], "aB3" * 200])
def test_a_secret_across_the_pieces_that_are_read_is_found(tree: Path, before: int, value: str) -> None:
    hold(tree, b"\1" * (secret_search._PIECE_BYTES - before) + value.encode() + b"\1" * PAGE)
    assert names(tree, {"A_KEY": value}) == ["A_KEY"]
    assert names(tree) == (["api-key"] if value.startswith("sk-") else [])


def test_a_secret_over_two_entries_of_a_pagemap_is_found(tree: Path) -> None:
    content = b"\1" * (PAGE - 5) + KEY.encode() + b"\1" * (PAGE - len(KEY) + 5)
    entries = [entry(BASE, 1), entry(BASE + PAGE, 1, flags=6)]
    write_dump(tree / "criu", [mapping(BASE, BASE + 2 * PAGE)], entries, content)
    assert names(tree, {"A_KEY": KEY}) == ["A_KEY"]


def test_neighbours_in_the_file_that_are_none_in_memory_make_no_secret(tree: Path) -> None:
    content = b"\1" * (PAGE - 5) + KEY.encode() + b"\1" * (PAGE - len(KEY) + 5)
    entries = [entry(BASE, 1), entry(BASE + 2 * PAGE, 1)]
    write_dump(tree / "criu", [mapping(BASE, BASE + 3 * PAGE)], entries, content)
    assert names(tree, {"A_KEY": KEY}) == []
    token = TOKENS["hugging-face-token"][0].encode()
    content = b"\1" * (PAGE - 10) + token + b"\1" * (PAGE - len(token) + 10)
    write_dump(tree / "criu", [mapping(BASE, BASE + 3 * PAGE)], entries, content)
    assert names(tree) == []


def test_a_hole_between_pages_has_no_bytes_in_the_file(tree: Path) -> None:
    entries = [entry(BASE, 1), entry(BASE + PAGE, 2, flags=2), entry(BASE + 3 * PAGE, 1)]
    write_dump(
        tree / "criu", [mapping(BASE, BASE + 4 * PAGE)], entries, ONE + KEY.encode().ljust(PAGE, b"\1")
    )
    assert names(tree, {"A_KEY": KEY}) == ["A_KEY"]


@pytest.mark.parametrize("zeros", [PAGE, 96 << 10, 1 << 20, 5 << 20])
def test_zeros_and_line_feeds_do_not_shift_what_is_found(tree: Path, zeros: int) -> None:
    """GNU grep 3.8 does not count buffers of zeros where lines end with zero bytes."""
    token = TOKENS["github-token"][0].encode()
    hold(tree, bytes(zeros) + b"\n" * 70_000 + token + bytes(zeros) + TOKENS["api-key"][0].encode() + b"\0\n")
    assert names(tree) == ["api-key", "github-token"]


@given(st.data())
@settings(max_examples=40)
def test_a_secret_is_found_exactly_where_memory_holds_it(
    tree: Path, monkeypatch: pytest.MonkeyPatch, data: st.DataObject
) -> None:
    """Pages with gaps; the secret anywhere in the file, in pieces of any size."""
    monkeypatch.setattr(secret_search, "_PIECE_BYTES", data.draw(st.sampled_from([700, PAGE, 3 * PAGE])))
    gaps = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=6))
    at = data.draw(st.integers(0, len(gaps) * PAGE - len(KEY)))
    content = bytearray(b"\1" * (len(gaps) * PAGE))
    content[at : at + len(KEY)] = KEY.encode()
    entries, address = [], BASE
    for gap in gaps:
        address += gap * PAGE
        entries.append(entry(address, 1))
        address += PAGE
    write_dump(tree / "criu", [mapping(BASE, address)], entries, bytes(content))
    whole = at // PAGE == (last := (at + len(KEY) - 1) // PAGE) or not gaps[last]
    assert names(tree, {"A_KEY": KEY}) == (["A_KEY"] if whole else [])


@pytest.mark.parametrize("file", ["criu/pipes-data.img", "criu/ghost-file-1.img", "shm/deep/file", "shm/seg"])
def test_other_files_are_searched(tree: Path, file: str) -> None:
    path = tree / file
    path.parent.mkdir(exist_ok=True)
    with open(path, "wb") as out:
        out.seek(3 << 20)
        out.write(KEY.encode() + b"\0" + TOKENS["api-key"][0].encode())
    found = search(tree, KnownSecrets.of({"A_KEY": KEY}, []))
    assert [each.name for each in found] == ["A_KEY", "api-key"]
    assert all(path.name in each.place for each in found)


def test_links_and_fifos_in_shm_are_passed_over(tree: Path) -> None:
    os.mkfifo(tree / "shm/fifo")
    (tree / "shm/link").symlink_to("/proc/self/environ")
    assert names(tree, {"A_KEY": KEY}) == []


def test_a_token_within_a_value_is_told_by_the_name_of_the_value(tree: Path) -> None:
    token = TOKENS["api-key"][0]
    for value in (token, f"key:{token}", "x" * 300 + token):
        hold(tree, value.encode())
        assert names(tree, {"A_KEY": value}) == ["A_KEY"]
        hold(tree, value.encode() + b"\0" + token.encode())
        assert "A_KEY" in names(tree, {"A_KEY": value})


@pytest.mark.parametrize("before", [0, 1, 100, 511, 512])
def test_that_holds_where_a_piece_ends_within_the_value(tree: Path, before: int) -> None:
    value = "x" * 312 + "a" * 150 + "/" + TOKENS["api-key"][4]
    hold(tree, b"\1" * (secret_search._PIECE_BYTES - before) + value.encode() + b"\0")
    assert names(tree, {"A_PASSWORD": value}) == ["A_PASSWORD"]


def test_a_value_within_another_is_told_too(tree: Path) -> None:
    hold(tree, f"redis://{KEY}-and-more".encode())
    assert names(tree, {"A_KEY": KEY, "B_KEY": f"{KEY}-and-more"}) == ["A_KEY", "B_KEY"]


def test_a_short_value_that_is_not_there_hides_no_token(tree: Path) -> None:
    hold(tree, TOKENS["aws-secret-key"][1].encode())
    short = TOKENS["aws-secret-key"][1].partition("=")[2][:3]
    assert names(tree, {"AWS_SECRET_ACCESS_KEY": short}) == ["aws-secret-key"]


def test_overlapping_beginnings_are_all_looked_at(tree: Path) -> None:
    token = TOKENS["hugging-face-token"][0]
    hold(tree, b"hf_" * 50 + b" " + token.encode() + b"\0api_org_hf_")
    assert names(tree) == ["hugging-face-token"]


def test_thousands_of_values_are_found(tree: Path) -> None:
    values = {f"S{index}_KEY": drawn(8 + index % 40) for index in range(3000)}
    hold(tree, "\0".join(values.values()).encode())
    assert names(tree, values) == sorted(values)


def test_with_nothing_to_search_for_nothing_is_found(tree: Path) -> None:
    hold(tree, TOKENS["api-key"][0].encode())
    assert names(tree, allow=[form.name for form in FORMS]) == []


def test_a_refusal_names_all_and_shows_nothing(tree: Path) -> None:
    token = TOKENS["github-token"][0]
    hold(tree, f"{KEY}\0{token}".encode())
    (tree / "shm" / "file").write_text("other-Key-1")
    with pytest.raises(SecretError) as raised:
        require_no_secrets(tree, KnownSecrets.of({"A_KEY": "other-Key-1"}, ["--b-token", KEY]))
    error = raised.value
    assert error.exit_status == 36
    assert error.message == (
        "the server's memory holds the value of --b-token, the value of A_KEY, a GitHub token"
    )
    assert "A_KEY: in /dev/shm/file" in error.cause
    assert "github-token: in the memory of process 7" in error.cause
    assert error.hint.endswith("--allow-secret b-token --allow-secret A_KEY --allow-secret github-token")
    text = f"{error.message} {error.cause} {error.hint}"
    assert KEY not in text
    assert token not in text


def test_nothing_found_is_no_refusal(tree: Path) -> None:
    require_no_secrets(tree, KnownSecrets.of({"A_KEY": KEY}, []))


def test_values_stay_out_of_errors_and_their_logs(tmp_path: Path) -> None:
    log = tmp_path / "stderr.log"
    log.write_text(f"key is {KEY}\n")
    credentials = KnownSecrets.of({"A_KEY": KEY}, [], ["A_KEY"])
    with pytest.raises(WorkloadError) as raised, credentials.kept_out_of_errors():
        raise WorkloadError(f"no {KEY}", cause=f"a {KEY} b", hint=KEY, log=log, command=["x", KEY])
    error = raised.value
    assert (error.message, error.cause, error.hint) == ("no REDACTED", "a REDACTED b", "REDACTED")
    assert error.command == ("x", "REDACTED")
    assert str(error) == "no REDACTED"
    assert log.read_text() == "key is REDACTED\n"


def test_a_dump_that_is_cut_off_is_no_pass(tree: Path) -> None:
    hold(tree, b"\1" * (4 << 20))
    os.truncate(tree / "criu/pages-1.img", (4 << 20) - 1)
    with pytest.raises(DumpError, match="cannot search the dump") as raised:
        names(tree)
    assert "pages-1.img is too short" in raised.value.cause


def test_a_dump_without_its_pages_is_no_pass(tree: Path) -> None:
    (tree / "criu/pages-1.img").unlink()
    with pytest.raises(DumpError, match="cannot search the dump"):
        names(tree)


def test_a_scan_that_fails_is_no_pass(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise hyperscan.error("no memory")

    monkeypatch.setattr(hyperscan, "Scratch", fail)
    with pytest.raises(DumpError, match="cannot search the dump"):
        names(tree)


def test_hyperscan_raises_what_its_callback_raised() -> None:
    database = hyperscan.Database()
    database.compile(["sk-"], elements=1, literal=True)

    def fail(*_: object) -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        database.scan(b"a sk- b", match_event_handler=fail)


def test_a_gigabyte_without_a_zero_byte_takes_little_memory(tree: Path) -> None:
    hold(tree, b"\xff" * (64 << 20))
    with memory_peak() as peak:
        assert names(tree, {"A_KEY": KEY}) == []
    assert peak[0] < 30 << 20


def test_no_descriptors_are_left(tree: Path) -> None:
    with contextlib.suppress(SecretError):
        require_no_secrets(tree, KnownSecrets.of({}, []))
    held = []
    for each in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            held.append(str(each.readlink()))
    assert not [path for path in held if path.startswith(str(tree))]
