# SPDX-License-Identifier: Apache-2.0
"""Authentication: the challenges of a registry, and a token for each scope.

The sources are RFC 9110 (challenges) and the distribution project's token authentication: a registry
answers 401 and names a realm, which gives a token for a scope in exchange for credentials.
"""

import re
import threading
import time
import urllib.parse
from collections.abc import Callable, Mapping

from msgspec import Struct, structs

from oci.registry.credentials import Credentials, advise
from oci.registry.transport import Answer
from oci.registry.url import Url, is_loopback
from rekindle.errors import CredentialsError, FormatError, RegistryError
from rekindle.fields import Fields

_TOKEN_LIMIT_BYTES = 1 << 20
_DEFAULT_SECONDS = 60  # what the token specification says of a token without `expires_in`
_RENEW_SECONDS = 10.0
_CHALLENGE_LIMIT = 4096  # the pattern takes time by the square of it
_CHALLENGES_LIMIT = 16
_PARAMETER = re.compile(r'(?<![\w-])([a-zA-Z][\w-]*)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]+))')
_TOKEN_FORM = re.compile(r"[!-~]+")

Ask = Callable[[str, Url, Mapping[str, str], bytes | None], Answer]


class Challenge(Struct, frozen=True, kw_only=True):
    """The challenge of a 401. The fields but `scheme` are those of a bearer token."""

    scheme: str
    realm: str = ""
    service: str = ""
    scope: str = ""
    error: str = ""

    @classmethod
    def parse(cls, headers: list[str]) -> "Challenge | None":
        """Return the challenge that we can answer, a bearer token before a password; None for no such."""
        found: dict[str, Challenge] = {}
        for header in headers[:_CHALLENGES_LIMIT]:
            scheme, _, rest = header[:_CHALLENGE_LIMIT].strip().partition(" ")
            parameters = {
                name.lower(): re.sub(r"\\(.)", r"\1", quoted) or plain
                for name, quoted, plain in _PARAMETER.findall(rest)
            }
            found[scheme.lower()] = cls(
                scheme=scheme.lower(),
                realm=parameters.get("realm", ""),
                service=parameters.get("service", ""),
                scope=parameters.get("scope", ""),
                error=parameters.get("error", ""),
            )
        return found.get("bearer") or found.get("basic")


class _Token(Struct, frozen=True, kw_only=True):
    text: str
    until: float


class Authorizer:
    """Makes the Authorization headers for requests to one registry. For many threads."""

    def __init__(
        self,
        login: str,
        ask: Ask,
        *,
        base: Url,
        find: Callable[[str], Credentials | None],
        repository: str = "",
    ) -> None:
        """`login` is the registry's name in docker's configuration, `base` where it is; `ask` sends one
        request to a realm. `repository` is the one whose credentials are looked for."""
        self._login = login
        self._account = f"{login}/{repository}" if repository else login
        self._ask = ask
        self._base = base
        self._find = find
        self._lock = threading.Lock()
        self._challenge: Challenge | None = None  # the last one, of any scope
        self._wanted: dict[str, str] = {}  # scopes that challenges named, by the scope that we asked for
        self._tokens: dict[str, _Token] = {}
        self._refusals: dict[str, CredentialsError] = {}
        self._credentials_lock = threading.Lock()
        self._credentials: Credentials | None = None
        self._looked = False

    def header(self, scope: str) -> str | None:
        """Return the header for a scope; None as long as the registry has not asked for one.

        Raises CredentialsError for credentials that were refused before.
        """
        challenge = self._challenge
        if challenge is None:
            return None
        if challenge.scheme == "basic":
            credentials = self._known_credentials()
            if credentials is not None and credentials.is_bearer:
                return f"Bearer {credentials.password}"
            return credentials.basic if credentials else None
        with self._lock:  # one thread asks for a token, the others wait for it
            token = self._tokens.get(scope)
            if token is None or token.until < time.monotonic():
                if refusal := self._refusals.get(scope):  # another try might lock the account
                    raise refusal
                challenge = structs.replace(challenge, scope=self._wanted.get(scope, ""))
                try:
                    token = self._tokens[scope] = self._fetch(challenge, scope)
                except CredentialsError as error:
                    self._refusals[scope] = error
                    raise
            return f"Bearer {token.text}"

    def answer(self, refused: str | None, challenges: list[str], scope: str) -> None:
        """Learn from a 401 that came to a request with the header `refused`, for the next one.

        Raises CredentialsError if there is nothing to learn: the credentials are wrong, or there are none.
        """
        challenge = Challenge.parse(challenges)
        if challenge is None:
            raise CredentialsError(
                f"{self._login} asks for credentials in a way that rekindle does not support",
                cause="; ".join(challenges)[:300] or "its 401 carries no challenge",
            )
        if challenge.scheme == "basic":
            if self._known_credentials() is None:
                raise self._refused("it asks for a password")
            if refused is not None:
                raise self._refused("it refuses the password")
        with self._lock:
            asked = f"{scope} {self._wanted.get(scope, '')}"
            self._challenge = challenge
            self._wanted[scope] = challenge.scope
            token = self._tokens.get(scope)
            if token is not None and refused == f"Bearer {token.text}":
                del self._tokens[scope]
                if token.until == float("inf"):
                    self._refusals[scope] = self._refused("it refuses the token")
                if challenge.error == "insufficient_scope" and covers(asked, challenge.scope):
                    self._refusals[scope] = self._refused(f"its token does not allow {challenge.scope}")

    def _known_credentials(self) -> Credentials | None:
        with self._credentials_lock:
            if not self._looked:
                self._credentials = self._find(self._account)
                self._looked = True
            return self._credentials

    def _fetch(self, challenge: Challenge, scope: str) -> _Token:
        credentials = self._known_credentials()
        if credentials is not None and credentials.is_bearer:
            return _Token(text=credentials.password, until=float("inf"))
        try:
            realm = Url.parse(challenge.realm)
        except ValueError as error:
            raise RegistryError(f"{self._login} names an invalid realm", cause=str(error)) from None
        if realm.scheme != "https" and not self._may_be_plain(realm):
            raise RegistryError(
                f"{self._login} asks for the password without TLS",
                cause=f"the realm of its tokens is {realm}",
                hint="this is an attack, or a mistake in the registry's configuration",
            )
        scopes = [each for each in dict.fromkeys([*scope.split(), *challenge.scope.split()]) if each]
        if covers(scope, challenge.scope):
            scopes = scope.split()
        headers: dict[str, str] = {}
        body = None
        query = [("service", challenge.service)] if challenge.service else []
        if credentials is not None and credentials.identity:
            form = [("grant_type", "refresh_token"), ("refresh_token", credentials.password), *query]
            form += [("client_id", "rekindle"), ("scope", " ".join(scopes))]
            body = urllib.parse.urlencode(form).encode()
            headers["Content-Type"] = "application/x-www-form-urlencoded"
            target = realm.target
        else:
            query += [("scope", each) for each in scopes]
            if credentials is not None:
                headers["Authorization"] = credentials.basic
            target = f"{realm.target}{'&' if '?' in realm.target else '?'}{urllib.parse.urlencode(query)}"
        url = Url(scheme=realm.scheme, host=realm.host, port=realm.port, target=target)
        with self._ask("POST" if body is not None else "GET", url, headers, body) as answer:
            if answer.status in {400, 401, 403}:
                raise self._refused(f"{url} answers {answer.status}")
            if answer.status != 200:
                raise RegistryError(f"{url} gives no token", cause=f"it answers {answer.status}")
            content = answer.read(_TOKEN_LIMIT_BYTES)
        return _parse_token(content, str(url))

    def _may_be_plain(self, realm: Url) -> bool:
        """Tell whether a password may go without TLS: to a registry reached without it, or to loopback."""
        if self._base.scheme == "https":
            return False
        return realm.host == self._base.host or is_loopback(realm.host)

    def _refused(self, cause: str) -> CredentialsError:
        hint = advise(self._login, self._known_credentials())
        return CredentialsError(f"{self._login} refuses access", cause=cause, hint=hint)


def covers(scope: str, other: str) -> bool:
    """Tell whether one scope allows all that another does."""
    return _rights(other) <= _rights(scope)


def _rights(scope: str) -> set[tuple[str, str]]:
    """Return the single actions that a scope allows, each with its resource."""
    parts = [each.rpartition(":") for each in scope.split()]
    return {(name, action) for name, _, actions in parts for action in actions.split(",")}


def _parse_token(content: bytes, where: str) -> _Token:
    try:
        fields = Fields.parse(content, "the token", limit_bytes=_TOKEN_LIMIT_BYTES)
        text = fields.text("token", "") or fields.text("access_token", "")
        lasts = fields.integer("expires_in") if fields.has("expires_in") else _DEFAULT_SECONDS
    except FormatError as error:
        raise RegistryError(f"{where} gives no token", cause=f"{error.message} {error.cause}") from None
    if not _TOKEN_FORM.fullmatch(text):
        raise RegistryError(f"{where} gives no token", cause="it is empty, or does not fit into a header")
    # Renewed while it is still good, so that a long request does not outlive it.
    seconds = max(lasts - _RENEW_SECONDS, lasts / 2)
    return _Token(text=text, until=time.monotonic() + seconds)
