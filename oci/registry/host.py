# SPDX-License-Identifier: Apache-2.0
"""One host of a registry: requests with credentials, retries and redirects."""

import json
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from msgspec import Struct, structs

from oci.registry.credentials import Credentials
from oci.registry.retry import RETRYABLE, TryAgainError, is_passing, retry_after, with_retries
from oci.registry.tokens import Authorizer
from oci.registry.transport import Answer, Body, Connections
from oci.registry.url import Url
from rekindle.errors import CredentialsError, IntegrityError, NotFoundError, RegistryError, RekindleError

if TYPE_CHECKING:
    from http.client import HTTPMessage

REDIRECTS = frozenset({301, 302, 303, 307, 308})
_OK = frozenset({200})
_REDIRECTS_LIMIT = 5
_ERROR_LIMIT_BYTES = 64 << 10
_AUTHORIZATIONS_LIMIT = 4  # other threads may have used up the token that we waited for


class Bytes(Struct, frozen=True):
    """A body that is in memory."""

    content: bytes

    @property
    def length(self) -> int:
        return len(self.content)

    @property
    def is_repeatable(self) -> bool:
        return True

    def pieces(self) -> Iterator[bytes]:
        yield self.content


class Host:
    """A registry, or a mirror of one. For many threads."""

    def __init__(
        self,
        base: Url,
        connections: Connections,
        find_credentials: Callable[[str], Credentials | None],
        *,
        name: str,
        login: str,
        repository: str = "",
        there: str = "",
        query: str = "",
        attempts: int | None = None,
    ) -> None:
        """`base` is where `/v2/` lies; `login` its name in docker's configuration; `repository` the one whose
        credentials are looked for, and `there` what this host calls it, if it has another name for it;
        `query` is added to every request, as mirrors want it; `attempts` are those of one request, in place
        of the policy's."""
        self.name = name
        self._base = base
        self._renamed = (repository, there) if there and there != repository else None
        self._query = query
        self._connections = connections
        policy = connections.settings.retry
        self._policy = structs.replace(policy, attempts=attempts) if attempts else policy
        # Time for two connects that time out, or for a name service to come up.
        self._first_contact_seconds = 2 * connections.settings.connect_seconds
        self._closing = threading.Event()
        self.authorizer = Authorizer(
            login, self._ask_realm, base=base, find=find_credentials, repository=there or repository
        )

    def url(self, path: str) -> Url:
        """Return the URL of a path below `/v2/`."""
        if self._renamed and path.startswith(f"{self._renamed[0]}/"):
            path = self._renamed[1] + path.removeprefix(self._renamed[0])
        target = f"{self._base.target.rstrip('/')}/v2/{path}"
        if self._query:
            target += f"{'&' if '?' in target else '?'}{self._query}"
        return structs.replace(self._base, target=target)

    def _scope(self, scope: str) -> str:
        """Return a scope with the name that this host has for the repository."""
        if self._renamed is None:
            return scope
        ours, there = (f"repository:{name}:" for name in self._renamed)
        return " ".join(
            there + each.removeprefix(ours) if each.startswith(ours) else each for each in scope.split()
        )

    def close(self) -> None:
        """End all waiting."""
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
        again: frozenset[int] = RETRYABLE,
    ) -> Answer:
        """Send a request and return the answer, if its status is one of those expected.

        What may succeed at another attempt is repeated as the policy says: broken connections, the statuses
        in `again`, and a token that has expired. `where` may be a function that gives another URL for each
        attempt. Raises NotFoundError for 404, CredentialsError for 401 and 403, RegistryError for everything
        else.
        """
        url = self._base

        def attempt() -> Answer:
            nonlocal url
            url = self.url(where) if isinstance(where, str) else where() if callable(where) else where
            answer = self._ask_authorized(method, url, scope, headers or {}, body)
            if answer.status in expected:
                return answer
            with answer:
                error = self._error_of(answer, method)
                if answer.status not in again:
                    raise error
                raise TryAgainError(error, wait_seconds=self._wait_asked_by(answer))

        return self._with_retries(attempt, lambda: url, attempts)

    def _with_retries(
        self, attempt: Callable[[], Answer], url: Callable[[], Url], attempts: int | None = None
    ) -> Answer:
        began = time.monotonic()
        policy = structs.replace(self._policy, attempts=attempts) if attempts else self._policy

        def is_first_contact() -> bool:
            return url().origin not in self._connections.met

        def is_waited_for(error: OSError) -> bool:
            return is_passing(error) and time.monotonic() - began < self._first_contact_seconds

        def is_final(error: OSError) -> bool:
            return self._closing.is_set() or (is_first_contact() and not is_waited_for(error))

        def is_free(error: OSError) -> bool:
            return is_first_contact() and not isinstance(error, TryAgainError) and is_waited_for(error)

        try:
            return with_retries(attempt, policy, pause=self.pause, is_final=is_final, is_free=is_free)
        except TryAgainError as error:
            raise error.error from None
        except OSError as error:
            raise self._unreachable(url(), error) from None

    def read(
        self, path: str, *, scope: str, headers: Mapping[str, str], limit_bytes: int
    ) -> "tuple[bytes, HTTPMessage]":
        """Read something small from the end of all redirects, and return it with the headers.

        What breaks midway is requested again. Raises the errors of `ask`.
        """

        def attempt() -> "tuple[bytes, HTTPMessage]":
            first = self.ask("GET", path, scope=scope, expected=_OK | REDIRECTS, headers=headers)
            with self.follow(first, scope=scope, expected=_OK, headers=headers) as answer:
                return answer.read(limit_bytes), answer.headers

        try:
            return with_retries(attempt, self._policy, pause=self.pause)
        except OSError as error:
            raise RegistryError(f"{self.name} fails", cause=str(error)) from None

    def follow(
        self, answer: Answer, *, scope: str, expected: frozenset[int], headers: Mapping[str, str]
    ) -> Answer:
        """Return the answer at the end of all redirects. Credentials stay with the host that they are for.

        Raises OSError if another attempt may help, RegistryError for a redirect that must not be followed.
        """
        origin = answer.url
        for _ in range(_REDIRECTS_LIMIT):
            if answer.status not in REDIRECTS:
                break
            with answer:
                url = target_of(answer)
            own = url.origin == self._base.origin and self.authorizer.header(self._scope(scope))
            extra = {"Authorization": own} if own else {}
            answer = self._connections.request("GET", url, {**headers, **extra})
        if answer.status in expected:
            return answer
        with answer:
            if answer.status in REDIRECTS:
                raise RegistryError(f"{origin} redirects more than {_REDIRECTS_LIMIT} times")
            said = f"{answer.url} answers {answer.status}{_error_text(answer)}"
            if answer.status in RETRYABLE:
                error = RegistryError(f"{self.name} fails", cause=said)
                raise TryAgainError(error, wait_seconds=self._wait_asked_by(answer))
        raise ConnectionError(said)  # an expired link, perhaps: another attempt gets another one

    def _ask_authorized(
        self, method: str, url: Url, scope: str, headers: Mapping[str, str], body: Body | None
    ) -> Answer:
        """Send a request; send it again if the registry asks for credentials or a token has expired."""
        scope = self._scope(scope)
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
            hint="check that this account has the right to do so",
        )

    def _ask_realm(self, method: str, url: Url, headers: Mapping[str, str], body: bytes | None) -> Answer:
        """Send a request to a token server, and return the answer unless its status is one of `RETRYABLE`."""

        def attempt() -> Answer:
            answer = self._connections.request(method, url, headers, Bytes(body) if body else None)
            if answer.status not in RETRYABLE:
                return answer
            with answer:
                error = RegistryError(f"{url} gives no token", cause=f"it answers {answer.status}")
                raise TryAgainError(error, wait_seconds=self._wait_asked_by(answer))

        return self._with_retries(attempt, lambda: url)

    def _unreachable(self, url: Url, error: OSError) -> RegistryError:
        late = isinstance(error, TimeoutError)
        hint = "check the name and the network"
        proxy = self._connections.proxy(url)
        if type(error).__name__ == "SSLCertVerificationError":
            tls = [f"{proxy.host}:{proxy.port}"] if proxy and proxy.scheme == "https" else []
            tls += [url.authority] if url.scheme == "https" else []
            hosts = " or ".join(f'[registry."{host}"]' for host in tls)
            hint = f"if the CA is your own: `ca_file` for {hosts} in the configuration"
        elif "ALERT" in str(error):
            hint = f"does it ask for a client certificate? See /etc/docker/certs.d/{url.authority}/"
        elif type(error).__name__ == "SSLError":
            hint = "if it does not speak TLS: --plain-http"
        elif isinstance(error, ConnectionResetError | BrokenPipeError):
            hint = f"if this happens to large uploads: {_SIZE_HINT}"
        through = ""
        if proxy:
            through = f", through the proxy {proxy}"
            hint = f"check ${url.scheme}_proxy and $no_proxy; {hint}"
            if "407" in str(error):
                hint = _proxy_password_hint(url)
        return RegistryError(
            f"{self.name} does not answer in time" if late else f"{self.name} cannot be reached",
            cause=f"{url}{through}: {error}",
            hint=hint,
        )

    def _error_of(self, answer: Answer, method: str) -> RekindleError:
        """Return the error that an answer means."""
        said = f"{method} {answer.url} is answered with {answer.status}{_error_text(answer)}"
        match answer.status:
            case 404:
                return NotFoundError(f"{self.name} does not have what was asked for", cause=said)
            case 401 | 403:
                return CredentialsError(
                    f"{self.name} does not allow it", cause=said, hint="check the rights of this account"
                )
            case 407:
                return RegistryError(
                    f"the proxy for {self.name} asks for a password",
                    cause=said,
                    hint=_proxy_password_hint(answer.url),
                )
            case 413:
                return RegistryError(f"{self.name} takes no upload of this size", cause=said, hint=_SIZE_HINT)
            case 400 if "DIGEST_INVALID" in said and "BLOB_UNKNOWN" not in said:
                return IntegrityError(f"{self.name} got other bytes than those of the digest", cause=said)
        return RegistryError(f"{self.name} fails", cause=said)

    def _wait_asked_by(self, answer: Answer) -> float | None:
        """Return after how many seconds an answer asks clients to retry. Raises RegistryError if too many."""
        header = answer.headers.get("Retry-After")
        asked = retry_after(header)
        longest = self._policy.longest_wait_seconds
        if asked is not None and asked > longest:
            raise RegistryError(
                f"{self.name} asks clients to retry after {asked:.0f} s",
                cause=f"Retry-After: {header} from {answer.url}",
                hint=f"try again then; `longest_wait_seconds` in the configuration is {longest}",
            )
        return asked

    def pause(self, seconds: float) -> None:
        """Wait before another attempt; raises RegistryError if the connections are closed meanwhile."""
        if self._closing.wait(seconds):
            raise RegistryError(f"the connections to {self.name} were closed")


_SIZE_HINT = (
    "raise the limit of the registry or of the proxy before it (nginx: client_max_body_size, "
    "proxy_read_timeout; ingress-nginx: proxy-body-size), or upload in parts: chunk_bytes of the registry in "
    "config.toml"
)


def _proxy_password_hint(url: Url) -> str:
    return f"write it into ${url.scheme}_proxy: http://USER:PASSWORD@HOST:PORT"


def target_of(answer: Answer, location: str | None = None) -> Url:
    """Return the URL of an answer's Location header, or of another reference that the answer gives.

    Raises RegistryError for what is not an http or https URL, and for one that leads away from TLS.
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


def _error_text(answer: Answer) -> str:
    """Return what a registry says about an error, by the specification's JSON or else in its first line."""
    try:
        content = answer.read(_ERROR_LIMIT_BYTES)
        errors = json.loads(content)["errors"]
        return ": " + "; ".join(f"{e['code']} {e.get('message', '')}".strip() for e in errors)[:300]
    except (RegistryError, OSError):
        return ""
    except (ValueError, KeyError, TypeError, RecursionError):
        line = content.decode(errors="replace").strip().partition("\n")[0]
        return f": {line[:200]}" if line and not line.startswith("<") else ""
