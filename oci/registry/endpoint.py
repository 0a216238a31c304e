# SPDX-License-Identifier: Apache-2.0
"""One host of a registry: asked with patience, by whoever we are to it, along its redirects."""

import dataclasses
import email.utils
import json
import random
import threading
import time
import urllib.parse
from collections.abc import Callable, Mapping
from typing import NoReturn

from oci.registry.credentials import Credentials
from oci.registry.tokens import Authorizer
from oci.registry.transport import Answer, Body, Connections, Send, Url
from rekindle.config import Patience
from rekindle.errors import CredentialsError, IntegrityError, NotFoundError, RegistryError

AGAIN = frozenset({408, 429, 500, 502, 503, 504})
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_REDIRECTS_LIMIT = 5
_ERROR_LIMIT_BYTES = 64 << 10
_FIRST_PAUSE_SECONDS = 0.2
_AUTHORIZATIONS_LIMIT = 4  # others may have used up the token that we waited for


@dataclasses.dataclass(frozen=True, slots=True)
class Bytes:
    """A body that is in memory."""

    content: bytes

    @property
    def length(self) -> int:
        return len(self.content)

    @property
    def is_repeatable(self) -> bool:
        return True

    def send(self, send: Send) -> None:
        send(self.content)


class Endpoint:
    """A registry, or a mirror of one. For many threads."""

    def __init__(
        self,
        base: Url,
        connections: Connections,
        find_credentials: Callable[[str], Credentials | None],
        *,
        name: str,
        login: str,
        query: str = "",
        attempts: int | None = None,
    ) -> None:
        """`base` is where `/v2/` lies; `login` its name in docker's configuration; `query` is added to every
        request, as mirrors want it; `attempts` are those of one request, in place of what patience says."""
        self.name = name
        self._base = base
        self._query = query
        self._connections = connections
        self._patience: Patience = connections.patience
        self.attempts = attempts or self._patience.attempts
        self._closing = threading.Event()
        self.authorizer = Authorizer(login, self._ask_realm, base=base, find=find_credentials)

    def url(self, path: str) -> Url:
        """Of a path below `/v2/`."""
        target = f"{self._base.target.rstrip('/')}/v2/{path}"
        if self._query:
            target += f"{'&' if '?' in target else '?'}{self._query}"
        return dataclasses.replace(self._base, target=target)

    def close(self) -> None:
        """Ends all waiting."""
        self._closing.set()

    def ask(
        self,
        method: str,
        where: str | Url | Callable[[], Url],
        *,
        scope: str,
        expected: frozenset[int],
        headers: Mapping[str, str] | None = None,
        body: Body | None = None,
        attempts: int | None = None,
        again: frozenset[int] = AGAIN,
    ) -> Answer:
        """The answer to a request, if its status is one of those expected.

        What is worth another try is tried again: broken connections, 429 and 5xx, as long and as often as
        patience says, and a token that has expired. `where` may be a function that gives another URL for
        each try. Raises NotFoundError for 404, CredentialsError for 401 and 403, RegistryError for
        everything else.
        """
        tries = attempts or self.attempts
        for attempt in range(1, tries + 1):
            last = attempt == tries
            url = self.url(where) if isinstance(where, str) else where() if callable(where) else where
            try:
                answer = self._ask_authorized(method, url, scope, headers or {}, body)
            except OSError as error:
                if last or self._is_hopeless(error, url):
                    self._raise_unreachable(url, error)
                self.pause(attempt)
                continue
            if answer.status in expected:
                return answer
            with answer:
                if answer.status not in again or last:
                    self._raise_for(answer, method)
                wait = answer.headers.get("Retry-After")
            self.pause(attempt, wait, url)
        raise AssertionError("not reached")

    def follow(
        self, answer: Answer, *, scope: str, expected: frozenset[int], headers: Mapping[str, str]
    ) -> Answer:
        """The answer at the end of a redirect. Credentials stay with the host that they are for.

        Raises OSError as long as another try may help, RegistryError for a redirect that nobody follows.
        """
        origin = answer.url
        for _ in range(_REDIRECTS_LIMIT):
            if answer.status not in _REDIRECTS:
                break
            with answer:
                url = target_of(answer)
            own = url.origin == self._base.origin and self.authorizer.header(scope)
            extra = {"Authorization": own} if own else {}
            answer = self._connections.request("GET", url, {**headers, **extra})
        if answer.status in expected:
            return answer
        with answer:
            if answer.status in _REDIRECTS:
                raise RegistryError(f"{origin} redirects more than {_REDIRECTS_LIMIT} times")
            said = f"{answer.url} answers {answer.status}{_words(answer)}"
        if answer.status in AGAIN:
            self.pause(1, answer.headers.get("Retry-After"), answer.url)
        raise ConnectionError(said)

    def _ask_authorized(
        self, method: str, url: Url, scope: str, headers: Mapping[str, str], body: Body | None
    ) -> Answer:
        """One try, or more if the registry asks who we are, or a token has expired."""
        own = url.origin == self._base.origin
        for _ in range(_AUTHORIZATIONS_LIMIT):
            header = self.authorizer.header(scope) if own else None
            extra = {"Authorization": header} if header else {}
            answer = self._connections.request(method, url, {**headers, **extra}, body)
            if answer.status != 401 or not own:
                return answer
            with answer:
                challenges = answer.headers.get_all("WWW-Authenticate") or []
            self.authorizer.answer(header, challenges, scope)
        raise CredentialsError(
            f"{self.name} refuses the tokens that it gives us",
            cause=f"{method} {url} with the scope {scope}",
            hint="does this account have the right to do so?",
        )

    def _ask_realm(self, method: str, url: Url, headers: Mapping[str, str], body: bytes | None) -> Answer:
        for attempt in range(1, self.attempts + 1):
            last = attempt == self.attempts
            wait = None
            try:
                answer = self._connections.request(method, url, headers, Bytes(body) if body else None)
                if answer.status not in AGAIN or last:
                    return answer
                with answer:
                    wait = answer.headers.get("Retry-After")
            except OSError as error:
                if last or self._is_hopeless(error, url):
                    self._raise_unreachable(url, error)
            self.pause(attempt, wait, url)
        raise AssertionError("not reached")

    def _is_hopeless(self, error: OSError, url: Url) -> bool:
        """Whether to say at once that a host is not there, rather than after all attempts."""
        if self._closing.is_set():
            return True
        first = url.origin not in self._connections.met
        return first and not isinstance(error, ConnectionResetError | ConnectionAbortedError)

    def _raise_unreachable(self, url: Url, error: OSError) -> NoReturn:
        late = isinstance(error, TimeoutError)
        hint = "is the name right, and the network up?"
        if type(error).__name__ == "SSLCertVerificationError":
            hint = f'set `ca_file` for [registry."{self.name}"] in the configuration, if the CA is your own'
        elif type(error).__name__ == "SSLError":
            hint = "does it speak TLS? If not: --plain-http"
        raise RegistryError(
            f"{self.name} does not answer in time" if late else f"{self.name} cannot be reached",
            cause=f"{url}: {error}",
            hint=hint,
        ) from None

    def _raise_for(self, answer: Answer, method: str) -> NoReturn:
        said = f"{method} {answer.url} is answered with {answer.status}{_words(answer)}"
        match answer.status:
            case 404:
                raise NotFoundError(f"{self.name} has no such thing", cause=said)
            case 401 | 403:
                raise CredentialsError(
                    f"{self.name} does not allow it", cause=said, hint="does this account have the right to?"
                )
            case 400 if "DIGEST_INVALID" in said:
                raise IntegrityError(f"{self.name} got other bytes than those of the digest", cause=said)
        raise RegistryError(f"{self.name} fails", cause=said)

    def pause(self, attempt: int, retry_after: str | None = None, url: Url | None = None) -> None:
        """Waits before the next try, as long as the registry asks for; returns early by an error."""
        asked = _seconds(retry_after)
        longest = self._patience.longest_wait_seconds
        if asked is not None and asked > longest:
            raise RegistryError(
                f"{self.name} wants to be left alone for {asked:.0f} s",
                cause=f"Retry-After: {retry_after} from {url}",
                hint=f"try again then; `longest_wait_seconds` in the configuration is {longest}",
            )
        pause = _FIRST_PAUSE_SECONDS * 2 ** (attempt - 1) * random.uniform(0.5, 1.0)  # noqa: S311
        if self._closing.wait(min(max(pause, asked or 0.0), longest)):
            raise RegistryError(f"the connections to {self.name} were closed")


def target_of(answer: Answer, location: str | None = None) -> Url:
    """Where an answer's Location header leads, or another URL that it names.

    Raises RegistryError for what is no http or https URL, and for one that leads away from TLS.
    """
    if location is None:
        location = answer.headers.get("Location", "")
    here = answer.url
    try:
        if not location:
            raise ValueError("it has no Location header")
        url = Url.parse(urllib.parse.urljoin(f"{here.scheme}://{here.authority}{here.target}", location))
    except ValueError as error:
        raise RegistryError(f"{here} leads nowhere", cause=str(error)) from None
    if here.scheme == "https" and url.scheme != "https":
        raise RegistryError(f"{here} leads away from TLS", cause=f"its Location is {url}")
    return url


def _seconds(retry_after: str | None) -> float | None:
    """What a Retry-After header asks for: seconds, or a date (RFC 9110)."""
    if retry_after is None:
        return None
    if retry_after.strip().isdecimal():
        return float(retry_after.strip()[:12])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def _words(answer: Answer) -> str:
    """What a registry says about an error, by the specification's JSON, or else its first line."""
    try:
        content = answer.read(_ERROR_LIMIT_BYTES)
        errors = json.loads(content)["errors"]
        return ": " + "; ".join(f"{e['code']} {e.get('message', '')}".strip() for e in errors)[:300]
    except (RegistryError, OSError):
        return ""
    except (ValueError, KeyError, TypeError, RecursionError):
        line = content.decode(errors="replace").strip().partition("\n")[0]
        return f": {line[:200]}" if line and not line.startswith("<") else ""
