# SPDX-License-Identifier: Apache-2.0
"""Recognize credentials: the forms of tokens, and the values of variables worth hiding.

In text, such as the files of a kernel cache, the form alone decides. Memory also holds the regular
expressions, documentation and identifiers of libraries, so there a token must also look random
(`Form.token_at`). See docs/secrets.md.
"""

import functools
import re
from collections.abc import Iterator
from pathlib import Path

from msgspec import Struct

from rekindle.secrets import HIDDEN

_NOTHING = frozenset(
    [
        *("none", "null", "nil", "false", "true", "yes", "no", "on", "off", "auto", "default"),
        *("disable", "disabled", "enable", "enabled", "empty"),  # EMPTY: no key, in vLLM's examples
    ]
)
_NUMBER = re.compile(r"[-+]?\d+(\.\d+)?")
# PASS, PWD and PW are words of a name (DB_PASS, --db-pass, MYSQL_PWD) or end one (SSHPASS). BYPASS, COMPASS,
# PASS_THROUGH, and the shell's PWD and OLDPWD, which are paths, are none; nor is --pwd.
WORDS_OF_PASSWORDS = (
    r"PASSWORD|PASSWD|PASSPHRASE|SECRET"
    r"|(?<=[A-Z\d][_.-])(?:PASS|PWD)(?![A-Z])|(?<![\w.])PASS(?![\w.-])|(?<=[A-Z\d][_.-])PW(?![\w.-])"
    r"|(?<=[A-Z]{2})(?<!BY)(?<!COM)(?<!SUR)(?<!TRES)PASS(?![\w.-])|(?<=[A-Z]{3})(?<!OLD)PWD(?![\w.-])"
)
_PASSWORD = re.compile(WORDS_OF_PASSWORDS, re.IGNORECASE)
_NAMES_A_FILE = re.compile(r"(?:PATH|FILE|DIR|SOCK|HOME|URL|URI)$", re.IGNORECASE)
# Public despite their names: GPG_KEY is the fingerprint in Docker's images of Python.
_PUBLIC = frozenset({"GPG_KEY", "XAUTHORITY", "SSH_AUTH_SOCK"})

_WORD = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-")
_EXAMPLE = re.compile(rb"EXAMPLE|x{6}|\*{4}|0{8}|1234567|abcdefg|your[-_]", re.IGNORECASE)
_LEAST_DISTINCT = 8  # sixteen random characters out of 32 have fewer distinct ones once in 40,000 times
_KEY_BODY = re.compile(
    rb"[\s\\nr]{1,8}(?:[A-Za-z-]{2,20}: [^\r\n\\]{1,100}[\s\\nr]{1,8}){0,3}([A-Za-z0-9+/]{40})"
)


class Form(Struct, frozen=True, kw_only=True):
    """The form of a kind of token. Each token contains one of the anchors, which a fast search looks for."""

    name: str
    title: str
    anchors: tuple[bytes, ...]
    source: bytes  # of the pattern, from the anchor to the end of the token
    chunk: int = 0  # it must contain a run of letters and digits, both, at least this long
    is_key: bool = False  # a PEM header, which counts only if a key follows
    is_inside: bool = False  # the anchor is in the middle of a word

    @property
    def pattern(self) -> re.Pattern[bytes]:
        """The pattern, compiled at its first use: most commands never meet a token."""
        return _compiled(self.source)

    @property
    def pattern_in_text(self) -> re.Pattern[bytes]:
        """The pattern with the beginning of a word, so that Triton's hashes and base32 keys do not match."""
        return _compiled((b"" if self.is_inside else rb"(?<![A-Za-z0-9_\-])") + b"(?:%b)" % self.source)

    def token_at(self, content: bytes, position: int) -> bytes | None:
        """Return the random part of the token at an anchor; None if it is an example or identifier."""
        found = self.pattern.match(content, position)
        if not found:
            return None
        token = found[0]
        before = content[position - 1] if position else 0
        # A serialized string may have its length before it, and that byte may be a letter.
        if before in _WORD and before != len(token) and not self.is_inside:
            return None
        if self.is_key:
            body = _KEY_BODY.match(content, found.end())
            return body[1] if body and _is_random(body[1]) else None
        drawn = found[found.re.groups]  # the last group, or the whole match if there is none
        return drawn if _is_random(drawn) and _is_mixed(drawn, self.chunk) else None


@functools.cache
def _compiled(source: bytes) -> re.Pattern[bytes]:
    return re.compile(source)


def _is_random(text: bytes) -> bool:
    return len(set(text)) >= _LEAST_DISTINCT and not _EXAMPLE.search(text)


def _is_mixed(text: bytes, least: int) -> bool:
    """Tell whether a text has two of lower case, upper case and digits, and a long mixed chunk."""
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
        source=pattern,
        chunk=options.get("chunk", 0),
        is_inside=bool(options.get("is_inside")),
    )


# From the providers' documentation and the rules of gitleaks, trufflehog and GitHub's secret scanning.
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
        "api-key",  # OpenAI, Anthropic, and many others
        "an API key",
        "sk-",
        rb"sk-(?:[a-z]+-)*(?=[A-Za-z0-9_\-]*[0-9])([A-Za-z0-9_\-]{20,255})" + _END,
        chunk=12,
    ),
    _form(
        "slack-token",
        "a Slack token",
        "xoxa- xoxb- xoxc- xoxd- xoxe- xoxo- xoxp- xoxr- xoxs- xapp-",
        rb"(?:xox[abcdeoprs]|xapp)-([A-Za-z0-9\-]{20,255})" + _END,
        chunk=8,
    ),
    _form(
        "gitlab-token",
        "a GitLab token",
        "glpat- gldt- glrt- glcbt- glptt- glft- glimt- glagent- glsoat-",
        rb"gl(?:pat|dt|rt|cbt|ptt|ft|imt|agent|soat)-([A-Za-z0-9_\-]{20,255})" + _END,
    ),
    _form("npm-token", "an npm token", "npm_", rb"npm_([A-Za-z0-9]{36})" + _END),
    # A macaroon in base64: its first bytes are the version and a location.
    _form("pypi-token", "a PyPI token", "pypi-AgE", rb"pypi-AgE([A-Za-z0-9_\-]{50,1000})" + _END),
    _form(
        "stripe-key",
        "a Stripe key",
        "sk_live_ rk_live_ sk_test_ rk_test_",
        rb"[sr]k_(?:live|test)_([A-Za-z0-9]{16,255})" + _END,
    ),
    _form("vault-token", "a Vault token", "hvs. hvb. hvr.", rb"hv[sbr]\.([A-Za-z0-9_\-]{24,300})" + _END),
    _form("docker-token", "a Docker Hub token", "dckr_pat_", rb"dckr_pat_([A-Za-z0-9_\-]{27})" + _END),
    _form("nvidia-api-key", "an NVIDIA API key", "nvapi-", rb"nvapi-([A-Za-z0-9_\-]{60,100})" + _END),
    _form(
        "json-web-token",
        "a JSON web token",
        "eyJ",
        # Header and claims are JSON objects. The subject of the documentation's example is 1234567890.
        rb"eyJ[A-Za-z0-9_\-]{8,2000}\.(?!eyJzdWIiOiIxMjM0NTY3ODkw)eyJ[A-Za-z0-9_\-]{8,8000}"
        rb"\.([A-Za-z0-9_\-]{20,1500})" + _END,
    ),
    _form(
        "webhook-url",
        "the URL of a webhook",
        "hooks.slack.com/ /api/webhooks/ .webhook.office.com/webhookb2/ /triggers/manual/paths/invoke?",
        rb"(?:hooks\.slack\.com/(?:services|workflows|triggers)/(?:[A-Za-z0-9]{1,40}/){1,4}"
        rb"|/api/webhooks/\d{10,25}/"  # Discord
        rb"|\.webhook\.office\.com/webhookb2/[0-9a-f@\-]{10,100}/[A-Za-z]{4,40}/"  # Teams
        rb"|/triggers/manual/paths/invoke\?[\w%&=.\-]{0,200}sig=)"  # workflows for Teams
        rb"([A-Za-z0-9_\-]{16,200})(?:/[0-9a-f\-]{36})?" + _END,
        is_inside=1,
    ),
    Form(
        name="private-key",
        title="a private key",
        anchors=(b"-----BEGIN ",),
        source=rb"-----BEGIN (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----",
        is_key=True,
    ),
)


def find_token(content: bytes) -> tuple[Form, int] | None:
    """Return the first form that matches in a text and the position of its token; None if none does."""
    for form in _forms_in(content):
        if found := form.pattern_in_text.search(content):
            return form, found.start()
    return None


def tokens_in(text: str) -> list[str]:
    """Return everything in a text that has the form of a token. A private key extends to the text's end."""
    content = text.encode(errors="surrogateescape")
    found = []
    for form in _forms_in(content):
        for each in form.pattern_in_text.finditer(content):
            token = content[each.start() :] if form.is_key else each[0]
            found.append(token.decode(errors="surrogateescape"))
    return found


def hide_tokens(text: str) -> str:
    """Return a text with its tokens hidden. A private key is cut off with everything after it."""
    content = text.encode(errors="surrogateescape")
    for form in _forms_in(content):
        if not form.is_key:
            content = form.pattern_in_text.sub(HIDDEN.encode(), content)
        elif found := form.pattern_in_text.search(content):
            content = content[: found.start()] + HIDDEN.encode()
    return content.decode(errors="surrogateescape")


def _forms_in(content: bytes) -> Iterator[Form]:
    """Yield the forms of which a text holds an anchor."""
    return (form for form in FORMS if any(anchor in content for anchor in form.anchors))


def names_password(name: str) -> bool:
    """Tell whether a variable's or option's name means a password, which a person may have chosen."""
    return _PASSWORD.search(name) is not None


def is_secret_value(name: str, value: str) -> bool:
    """Tell whether the value of a variable or option with a secret's name can be a secret.

    Words like `true`, paths, and numbers except for passwords cannot: HF_TOKEN_PATH is the path of a token.
    """
    text = value.strip()
    if name in _PUBLIC or not text or text.lower() in _NOTHING:
        return False
    if _NUMBER.fullmatch(text):
        return len(text) >= 4 and names_password(name)
    if text.startswith(("/", "./", "../", "~/")):
        path = Path(text)
        has_parent = path.parent != Path("/") and path.parent.is_dir()
        return not (_NAMES_A_FILE.search(name) or has_parent or path.exists())
    return True
