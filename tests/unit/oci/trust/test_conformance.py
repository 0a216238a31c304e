# SPDX-License-Identifier: Apache-2.0
"""Sigstore's conformance vectors, run offline; docs/conformance.md says case by case what comes out.

They lie beside the repository.
"""

import base64
import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from oci.trust import keyless
from oci.trust.bundle import Bundle
from oci.trust.keys import PrivateKey, PublicKey
from oci.trust.policy import Identity
from rekindle.errors import FormatError, UsageError
from tests.conftest import ROOT, VECTORS

TABLE = ROOT / "docs" / "conformance.md"
_BEACON = "https://github.com/sigstore-conformance/extremely-dangerous-public-oidc-beacon"
IDENTITY = f"{_BEACON}/.github/workflows/extremely-dangerous-oidc-beacon.yml@refs/heads/main"
ISSUER = "https://token.actions.githubusercontent.com"


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table, without its remark: True stands for accepted."""

    case: str
    must: bool
    rekindle: bool
    beneath: bool


@dataclass(frozen=True, slots=True)
class Case:
    """A folder of the vectors."""

    place: Path

    @property
    def must(self) -> bool:
        return not self.place.name.endswith("_fail")

    @property
    def content(self) -> bytes:
        return (self.place / "bundle.sigstore.json").read_bytes()

    @property
    def artifact(self) -> bytes:
        own = self.place / "artifact"
        return (own if own.exists() else VECTORS / "a.txt").read_bytes()

    @property
    def who(self) -> Identity:
        identity, issuer = self.place / "identity", self.place / "issuer"
        return Identity(
            identity=identity.read_text().strip() if identity.exists() else IDENTITY,
            issuer=issuer.read_text().strip() if issuer.exists() else ISSUER,
        )

    @property
    def key(self) -> PublicKey | None:
        path = self.place / "key.pub"
        return PublicKey.read(path) if path.exists() else None

    @property
    def trusted_root(self) -> Path | None:
        path = self.place / "trusted_root.json"
        return path if path.exists() else None

    def rekindle(self) -> str:
        """Why `rekindle` refuses it, or nothing. It takes statements only, and bundles of version 0.3."""
        try:
            bundle = Bundle.parse(self.content)
            if self.key is not None:
                statement = bundle.statement(self.key)
                reason = "another key signed it"
            else:
                found = keyless.verify(bundle, [self.who], trusted_root=self.trusted_root)
                statement = None if isinstance(found, str) else found.statement
                reason = found if isinstance(found, str) else ""
        except FormatError as error:
            return error.summary
        except UsageError as error:
            return error.summary
        if statement is None:
            return reason
        digest = hashlib.sha256(self.artifact).hexdigest()
        return "" if statement.subject.hex == digest else "it is about something else"

    def beneath(self) -> str:
        """Why what `rekindle` stands on refuses it, or nothing: sigstore-python, or our own check with a key.

        It takes messages and older bundles too, so that it is tried with all of the vectors.
        """
        try:
            if self.key is not None:
                signature = base64.b64decode(json.loads(self.content)["messageSignature"]["signature"])
                return "" if self.key.verifies(signature, self.artifact) else "another key signed it"
            return self._by_sigstore()
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    def _by_sigstore(self) -> str:
        from sigstore.models import Bundle as Found
        from sigstore.verify import Verifier, policy

        verifier = Verifier(trusted_root=keyless.read_trusted_root(self.trusted_root))
        who = policy.Identity(identity=self.who.identity, issuer=self.who.issuer)
        found = Found.from_json(self.content)
        if "dsseEnvelope" not in json.loads(self.content):
            verifier.verify_artifact(self.artifact, found, who)
            return ""
        _, payload = verifier.verify_dsse(found, who)
        subjects = [each["digest"].get("sha256") for each in json.loads(payload)["subject"]]
        digest = hashlib.sha256(self.artifact).hexdigest()
        return "" if digest in subjects else "it is about something else"

    def row(self) -> Row:
        return Row(self.place.name, self.must, not self.rekindle(), not self.beneath())


def cases() -> list[Case]:
    return [Case(place) for place in sorted(VECTORS.iterdir()) if place.is_dir()] if VECTORS.is_dir() else []


def table() -> Iterator[tuple[Row, str]]:
    """The lines of the document's table, each with its remark."""
    said = {"accepted": True, "refused": False}
    for line in TABLE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `") and len(cells) == 5:
            case, must, rekindle, beneath, remark = cells
            yield Row(case.strip("`"), said[must], said[rekindle], said[beneath]), remark


@pytest.mark.vectors
@pytest.mark.parametrize("case", cases(), ids=lambda case: case.place.name)
def test_what_the_table_says_is_so(case: Case, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    row = case.row()
    assert row.must or not (row.rekindle or row.beneath), "a case that must fail is accepted"
    assert row in [each for each, _ in table()], (row, case.rekindle(), case.beneath())


@pytest.mark.vectors
def test_the_table_lists_every_case_once() -> None:
    assert [row.case for row, _ in table()] == [case.place.name for case in cases()]


def test_the_table_accepts_nothing_that_must_fail_and_says_why_it_refuses_what_need_not() -> None:
    rows = list(table())
    assert len(rows) > 60
    for row, remark in rows:
        if not row.must:
            assert not row.rekindle, row.case
            assert not row.beneath, row.case
        if row.must and not (row.rekindle and row.beneath):
            assert remark, row.case


@pytest.mark.vectors
def test_a_managed_key_verifies_its_own_message_only() -> None:
    """The suite's wrong key is malformed, which proves nothing of signatures."""
    case = Case(VECTORS / "managed-key-happy-path")
    signature = base64.b64decode(json.loads(case.content)["messageSignature"]["signature"])
    assert case.key is not None
    assert case.key.verifies(signature, case.artifact)
    assert not case.key.verifies(signature, case.artifact + b"\n")
    assert not PrivateKey.generate().public.verifies(signature, case.artifact)
