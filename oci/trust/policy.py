# SPDX-License-Identifier: Apache-2.0
"""Whom to trust: a file of rules, by the name of an image.

    [[image]]
    name = "registry.example.com/models/*"      a pattern over host and repository, or a name in the store
    keys = ["prod.pub"]                         files, beside this one unless their path is absolute
    identities = [{ identity = "…", issuer = "…" }, { identity_regexp = "…", issuer_regexp = "…" }]
    authorities = [{ ca = "ca.pem", identity_regexp = "…" }]     of one's own, without a log
    max_age_days = 30
    transparency_log = true                     require an entry in a log
    trusted_root = "trusted_root.json"          for logs and identities; default: the public good instance's

The first rule whose pattern matches applies. One section is not about trust, but about this node:

    [match]
    soft = ["driver"]                           rules of docs/matching.md that no longer forbid a rung
    hard = ["kernel"]                           rules that do
    environment = ["HF_HOME", "OMP_*"]          variables that may differ from the snapshot's
"""

import fnmatch
import re
from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct

from oci.trust import certificate
from oci.trust.certificate import Authority
from oci.trust.keys import PublicKey
from rekindle.errors import FormatError, UsageError
from rekindle.fields import Fields, text_item

_FILE_LIMIT_BYTES = 1 << 20
_RULES_LIMIT = 1000
_SIGNERS_LIMIT = 100
_DAYS_LIMIT = 100_000
_FIELDS = {"name", "keys", "identities", "authorities", "max_age_days", "transparency_log", "trusted_root"}


class Identity(Struct, frozen=True, kw_only=True):
    """The subject of a certificate issued by Fulcio, and its OIDC issuer. Both are compared in full.

    Of each, either the text is given, or a regular expression that all of it must match.
    """

    identity: str = ""
    issuer: str = ""
    identity_regexp: str = ""
    issuer_regexp: str = ""


class TrustRule(Struct, frozen=True, kw_only=True):
    """The keys, identities and authorities of which one must have signed an image, and its greatest age."""

    name: str
    keys: tuple[PublicKey, ...] = ()
    identities: tuple[Identity, ...] = ()
    authorities: tuple[Authority, ...] = ()
    max_age_days: int | None = None
    transparency_log: bool = False
    trusted_root: Path | None = None


class Policy(Struct, frozen=True, kw_only=True):
    """Rules in order, and the codes of differences between nodes that are made soft or hard.

    `variables` are patterns of variables that may differ.
    """

    rules: Sequence[TrustRule] = ()
    soft: frozenset[str] = frozenset()
    hard: frozenset[str] = frozenset()
    variables: frozenset[str] = frozenset()

    def rule_for(self, name: str) -> TrustRule | None:
        """Return the first rule that matches an image, given its name without tag and digest."""
        return next((rule for rule in self.rules if fnmatch.fnmatchcase(name, rule.name)), None)

    @classmethod
    def read(cls, path: Path) -> "Policy":
        """Read a policy file. Raises UsageError if it cannot be read or is invalid."""
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UsageError(f"the policy {path} cannot be read", cause=str(error)) from None
        try:
            return cls.parse(content, path.parent)
        except FormatError as error:
            raise UsageError(
                f"invalid policy {path}",
                cause=error.summary,
                hint="docs/trust.md describes the format",
            ) from None

    @classmethod
    def parse(cls, content: bytes, directory: Path) -> "Policy":
        """Parse a policy. Relative paths in it begin at `directory`. Raises FormatError, UsageError."""
        document = Fields.parse_toml(content, "it", limit_bytes=_FILE_LIMIT_BYTES)
        document.only({"image", "match"})
        fields = Fields({"image": [], "match": {}, **document.as_json()}, "policy")
        matching = fields.inner("match")
        matching.only({"soft", "hard", "environment"})

        def rule(value: object, where: str) -> TrustRule:
            return _rule(value, where, directory)

        def texts(name: str) -> frozenset[str]:
            return frozenset(matching.texts(name, at_most=_RULES_LIMIT) if matching.has(name) else ())

        return cls(
            rules=tuple(fields.list_of("image", rule, at_most=_RULES_LIMIT)),
            soft=texts("soft"),
            hard=texts("hard"),
            variables=texts("environment"),
        )


def _rule(value: object, where: str, directory: Path) -> TrustRule:
    given = Fields(value, where)
    given.only(_FIELDS)
    paths = given.list_of("keys", _path, at_most=_SIGNERS_LIMIT) if given.has("keys") else []
    identities = (
        given.list_of("identities", _identity, at_most=_SIGNERS_LIMIT) if given.has("identities") else []
    )
    authorities = []
    if given.has("authorities"):
        authorities = given.list_of(
            "authorities", lambda value, at: _authority(value, at, directory), at_most=_SIGNERS_LIMIT
        )
    if not paths and not identities and not authorities:
        raise FormatError(f"{where} has neither keys nor identities nor authorities")
    logged = given.boolean("transparency_log", default=False)
    if logged and authorities:
        raise FormatError(f"{where} has authorities and requires a transparency log, which they do without")
    return TrustRule(
        name=given.text("name"),
        keys=tuple(PublicKey.read(directory / path) for path in paths),
        identities=tuple(identities),
        authorities=tuple(authorities),
        max_age_days=given.integer("max_age_days", at_least=1, at_most=_DAYS_LIMIT)
        if given.has("max_age_days")
        else None,
        transparency_log=logged,
        trusted_root=directory / _path(given.text("trusted_root"), where)
        if given.has("trusted_root")
        else None,
    )


def _path(value: object, where: str) -> str:
    path = text_item(value, where)
    if not path or "\0" in path:
        raise FormatError(f"{where} is not a file name", cause=f"{path!r:.80}")
    return path


def _identity(value: object, where: str) -> Identity:
    given = Fields(value, where)
    names = ("identity", "issuer", "identity_regexp", "issuer_regexp")
    given.only(set(names))
    return identity(*(given.text(name, "") for name in names))


def _authority(value: object, where: str, directory: Path) -> Authority:
    given = Fields(value, where)
    given.only({"ca", "identity", "identity_regexp"})
    roots = certificate.roots(directory / _path(given.text("ca"), where))
    return authority(roots, given.text("identity", ""), given.text("identity_regexp", ""))


def authority(roots: bytes, name: str, name_regexp: str = "") -> Authority:
    """Return an authority. Raises FormatError if the name is missing, given twice or not a pattern."""
    if bool(name) == bool(name_regexp) or "*" in name:
        raise FormatError("an authority needs a name, in full and without *, or a regular expression")
    _require_pattern(name_regexp)
    return Authority(roots=roots, identity=name, identity_regexp=name_regexp)


def _require_pattern(pattern: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise FormatError(f"{pattern!r:.80} is not a regular expression", cause=str(error)) from None


def identity(name: str, issuer: str, name_regexp: str = "", issuer_regexp: str = "") -> Identity:
    """Return an identity. Raises FormatError if a part is missing, given twice or not a pattern."""
    for text, pattern in ((name, name_regexp), (issuer, issuer_regexp)):
        if bool(text) == bool(pattern) or "*" in text:
            raise FormatError(
                "an identity needs a name and an issuer, both in full and without *, or regular expressions"
            )
        _require_pattern(pattern)
    return Identity(identity=name, issuer=issuer, identity_regexp=name_regexp, issuer_regexp=issuer_regexp)
