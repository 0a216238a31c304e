# SPDX-License-Identifier: Apache-2.0
"""What credentials look like: the forms of tokens, and which values of variables are worth hiding.

A form alone decides in texts that somebody wrote, such as files of a kernel cache. Memory also holds the
regexes, documentation and identifiers of libraries, so there a token must look drawn by lot, too
(`Form.token_at`). See docs/secrets.md.
"""

import re
from dataclasses import dataclass
from pathlib import Path

HIDDEN = b"REDACTED"

_NOTHING = frozenset(
    [
        *("none", "null", "nil", "false", "true", "yes", "no", "on", "off", "auto", "default"),
        *("disable", "disabled", "enable", "enabled", "empty"),  # EMPTY: vLLM's examples have it for no key
    ]
)
_NUMBER = re.compile(r"[-+]?\d+(\.\d+)?")
_PASSWORD = re.compile(r"PASSWORD|PASSWD|SECRET", re.IGNORECASE)
_NAMES_A_FILE = re.compile(r"(?:PATH|FILE|DIR|SOCK|HOME|URL|URI)$", re.IGNORECASE)
# Public, in spite of their names: GPG_KEY is the fingerprint that Docker's images of Python come with.
_PUBLIC = frozenset({"GPG_KEY", "XAUTHORITY", "SSH_AUTH_SOCK"})

_WORD = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-")
_EXAMPLE = re.compile(rb"EXAMPLE|x{6}|\*{4}|0{8}|1234567|abcdefg|your[-_]", re.IGNORECASE)
_LEAST_DISTINCT = 8  # of sixteen random characters out of 32, fewer are distinct once in 40,000 times
_KEY_BODY = re.compile(
    rb"[\s\\nr]{1,8}(?:[A-Za-z-]{2,20}: [^\r\n\\]{1,100}[\s\\nr]{1,8}){0,3}([A-Za-z0-9+/]{40})"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """The form of a kind of token. Each begins with one of its anchors, which is all a fast search needs."""

    name: str
    title: str
    anchors: tuple[bytes, ...]
    pattern: re.Pattern[bytes]  # from the anchor to the end of the token
    chunk: int = 0  # the least length of a stretch of letters and digits in it that mixes both
    is_key: bool = False  # a PEM header: what counts is whether a key follows
    is_inside: bool = False  # the anchor is in the middle of a word

    def token_at(self, content: bytes, position: int) -> bytes | None:
        """The part of the token at an anchor that was drawn by lot; None for an example or identifier."""
        found = self.pattern.match(content, position)
        if not found:
            return None
        token = found[0]
        before = content[position - 1] if position else 0
        # Where serialised strings have their length before them, that byte may be a letter.
        if before in _WORD and before != len(token) and not self.is_inside:
            return None
        if self.is_key:
            body = _KEY_BODY.match(content, found.end())
            return body[1] if body and _is_random(body[1]) else None
        drawn = found[found.re.groups]  # the last group; the whole where there is none
        return drawn if _is_random(drawn) and _mixes(drawn, self.chunk) else None


def _is_random(text: bytes) -> bool:
    return len(set(text)) >= _LEAST_DISTINCT and not _EXAMPLE.search(text)


def _mixes(text: bytes, least: int) -> bool:
    """Whether two of lower case, upper case and digits are there, and a chunk with letters and digits."""
    kinds = sum(bool(re.search(kind, text)) for kind in (rb"[a-z]", rb"[A-Z]", rb"[0-9]"))
    if kinds < 2:
        return False
    chunks = [chunk for chunk in re.split(rb"[-_]", text) if len(chunk) >= least]
    return not least or any(re.search(rb"[0-9]", c) and re.search(rb"[A-Za-z]", c) for c in chunks)


def _form(name: str, title: str, anchors: str, pattern: bytes, **options: int) -> Form:
    return Form(
        name=name,
        title=title,
        anchors=tuple(anchor.encode() for anchor in anchors.split(" ")),
        pattern=re.compile(pattern),
        chunk=options.get("chunk", 0),
        is_inside=bool(options.get("is_inside")),
    )


# The providers' documentation, and the rules of gitleaks, trufflehog and GitHub's secret scanning.
_END = rb"(?![A-Za-z0-9])"
FORMS = (
    _form(
        "hugging-face-token",
        "a Hugging Face token",
        "hf_ api_org_",
        rb"(?:hf_|api_org_)([A-Za-z0-9]{30,100})" + _END,
    ),
    _form(
        "github-token",
        "a GitHub token",
        "ghp_ gho_ ghu_ ghs_ ghr_ github_pat_",
        rb"(?:gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_[A-Za-z0-9_]{22,255})" + _END,
    ),
    _form("aws-access-key", "an AWS access key", "AKIA ASIA", rb"A[KS]IA([0-9A-Z]{16})" + _END),
    _form(
        "aws-secret-key",
        "an AWS secret key",
        "aws_secret_access_key AWS_SECRET_ACCESS_KEY SecretAccessKey",
        rb"(?:aws_secret_access_key|AWS_SECRET_ACCESS_KEY|SecretAccessKey)"
        rb"""\\?["']?[ \t]*[=:][ \t]*\\?["']?([A-Za-z0-9/+]{40})(?![A-Za-z0-9/+=])""",
    ),
    _form("google-api-key", "a Google API key", "AIza", rb"AIza([A-Za-z0-9_\-]{35})" + _END),
    _form(
        "azure-storage-key",
        "an Azure storage key",
        "AccountKey=",
        rb"AccountKey=([A-Za-z0-9+/]{86})==",
    ),
    _form(
        "azure-client-secret",
        "an Azure client secret",
        "7Q~ 8Q~",
        rb"(?<=[A-Za-z0-9_~.\-]{3})[78]Q~([A-Za-z0-9_~.\-]{31,34})" + _END,
        is_inside=1,
    ),
    _form(
        "api-key",  # OpenAI, Anthropic, and many that took it from them
        "an API key",
        "sk-",
        rb"sk-(?:[a-z]+-)*(?=[A-Za-z0-9_\-]*[0-9])([A-Za-z0-9_\-]{20,255})" + _END,
        chunk=12,
    ),
    _form(
        "slack-token",
        "a Slack token",
        "xoxa- xoxb- xoxe- xoxo- xoxp- xoxr- xoxs- xapp-",
        rb"(?:xox[abeoprs]|xapp)-([A-Za-z0-9\-]{20,255})" + _END,
        chunk=8,
    ),
    Form(
        name="private-key",
        title="a private key",
        anchors=(b"-----BEGIN ",),
        pattern=re.compile(rb"-----BEGIN (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----"),
        is_key=True,
    ),
)
# Each begins where a word does, so that no hash or base32 key of Triton's is taken for one.
_IN_TEXT = tuple(
    (
        form,
        re.compile((b"" if form.is_inside else rb"(?<![A-Za-z0-9_\-])") + b"(?:%b)" % form.pattern.pattern),
    )
    for form in FORMS
)


def find_token(content: bytes) -> tuple[Form, int] | None:
    """The first form that something in a text has, and where."""
    for form, pattern in _IN_TEXT:
        if found := pattern.search(content):
            return form, found.start()
    return None


def tokens_in(text: str) -> list[str]:
    """What has the form of a token in a text. A private key goes to the text's end."""
    content = text.encode(errors="surrogateescape")
    found = []
    for form, pattern in _IN_TEXT:
        for each in pattern.finditer(content):
            token = content[each.start() :] if form.is_key else each[0]
            found.append(token.decode(errors="surrogateescape"))
    return found


def hide_tokens(text: str) -> str:
    """The text without what has the form of a token. Of a private key, nothing after its header is left."""
    content = text.encode(errors="surrogateescape")
    for form, pattern in _IN_TEXT:
        if not form.is_key:
            content = pattern.sub(HIDDEN, content)
        elif found := pattern.search(content):
            content = content[: found.start()] + HIDDEN
    return content.decode(errors="surrogateescape")


def is_secret_value(name: str, value: str) -> bool:
    """Whether the value of a variable or option that sounds like a secret can be one.

    Words like `true`, numbers (but of a password) and paths are none: HF_TOKEN_PATH says where a token is.
    """
    text = value.strip()
    if name in _PUBLIC or not text or text.lower() in _NOTHING:
        return False
    if _NUMBER.fullmatch(text):
        return len(text) >= 4 and _PASSWORD.search(name) is not None
    if text.startswith(("/", "./", "../", "~/")):
        path = Path(text)
        there = path.parent != Path("/") and path.parent.is_dir()
        return not (_NAMES_A_FILE.search(name) or there or path.exists())
    return True
