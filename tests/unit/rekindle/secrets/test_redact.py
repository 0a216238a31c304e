# SPDX-License-Identifier: Apache-2.0
"""A record tells no secret that a name gives away."""

import pytest

from rekindle.secrets.redact import is_secret_name, redact_command, redact_environment


@pytest.mark.parametrize(
    "name",
    [
        *("VLLM_API_KEY", "HF_TOKEN", "hf_token", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "PGPASSWD"),
        *("GOOGLE_CREDENTIALS", "BASIC_AUTH", "Authorization", "X-Api-Key", "Cookie", "Set-Cookie", "OAuth2"),
        *("API_TOKENS", "DB_PASS", "SMTP_PASS2", "DB_PASS_PROD", "SSHPASS", "dbPass", "PASS", "MYSQL_PWD"),
        *("userPwd", "GITLAB_PAT", "GH_PAT_RO", "PAT", "GPG_PASSPHRASE", "LDAP_PW"),
    ],
)
def test_the_name_of_a_secret_is_recognised(name: str) -> None:
    assert is_secret_name(name)
    assert redact_environment({name: "hush"}) == {}


@pytest.mark.parametrize(
    "name",
    [
        "PATH",
        "LANG",
        "VLLM_CACHE_ROOT",
        "",
        "TOKENIZERS_PARALLELISM",
        "Content-Type",
        "max-num-batched-tokens",
        *("PWD", "OLDPWD", "PYTHONPATH", "PATTERN", "COMPAT_MODE", "BYPASS", "COMPASS", "PASS_THROUGH"),
        *("GIT_AUTHOR_NAME", "PW", "PWDEBUG", "PASSIVE", "XPASS"),
    ],
)
def test_another_name_does_not(name: str) -> None:
    assert not is_secret_name(name)
    assert redact_environment({name: "value"}) == {name: "value"}


def test_the_environment_is_sorted() -> None:
    assert list(redact_environment({"B": "2", "A": "1"})) == ["A", "B"]


COMMANDS: dict[str, tuple[list[str], list[str]]] = {
    "value behind": (["m", "--api-key", "sk-1"], ["m", "--api-key", "REDACTED"]),
    "values behind": (["--api-key", "a", "b", "--x", "c"], ["--api-key", "REDACTED", "REDACTED", "--x", "c"]),
    "value after =": (["--api-key=sk-1", "x"], ["--api-key=REDACTED", "x"]),
    "empty value": (["--api-key=", "x"], ["--api-key=REDACTED", "x"]),
    "value with =": (["--api-key=a=b"], ["--api-key=REDACTED"]),
    "value with a dash": (["--api-key", "-sk"], ["--api-key", "REDACTED"]),
    "underscores": (["--api_key", "sk-1"], ["--api_key", "REDACTED"]),
    "upper case": (["--HF-TOKEN", "hf_1"], ["--HF-TOKEN", "REDACTED"]),
    "two": (["--token", "a", "--password", "b"], ["--token", "REDACTED", "--password", "REDACTED"]),
    "behind a flag": (
        ["--allow-credentials", "--api-key", "sk-1"],
        ["--allow-credentials", "--api-key", "REDACTED"],
    ),
    "a password": (["--db-pass", "x", "--smtp-pwd=y"], ["--db-pass", "REDACTED", "--smtp-pwd=REDACTED"]),
    "a webhook": (
        ["--notify", "https://hooks.slack.com/services/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"],
        ["--notify", "https://REDACTED"],
    ),
    "in a variable": (["env", "HF_TOKEN=sk-1", "A=b", "serve"], ["env", "HF_TOKEN=REDACTED", "A=b", "serve"]),
    "in a URL": (["--db=postgres://me:pw@host/db", "x"], ["--db=postgres://REDACTED@host/db", "x"]),
}


@pytest.mark.parametrize(("argv", "wanted"), COMMANDS.values(), ids=COMMANDS)
def test_values_of_secrets_leave_the_command(argv: list[str], wanted: list[str]) -> None:
    assert redact_command(argv) == wanted


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["vllm", "serve", "m", "--port", "8000"],
        ["serve", "--api-key"],
        ["my-token", "x"],
        ["--tokenizer", "t", "--max-num-batched-tokens", "8192"],
        ["serve", "--allow-credentials", "--port", "8000", "--host", "::"],
        ["serve", "--skip-tokenizer-init", "m"],
        ["--url=http://host/path@version", "http://host"],
        ["--pwd", "/work", "--path", "/x", "--pattern", "y", "PWD=/x"],
    ],
)
def test_a_command_without_secrets_stays_as_it_is(argv: list[str]) -> None:
    assert redact_command(argv) == argv


@pytest.mark.parametrize(
    "script",
    [
        "exec vllm serve --api-key sk-1",
        "exec vllm serve --api-key=sk-1 --port 1",
        "vllm serve --port 1 --api-key=k --token sk-1; HF_TOKEN=sk-1 x",
        "curl https://me:sk-1@host/",
    ],
)
def test_no_secret_stays_in_a_shells_command(script: str) -> None:
    assert "sk-1" not in " ".join(redact_command(["sh", "-c", script]))


@pytest.mark.parametrize(
    "argv",
    [
        ["serve", "--password=correct sk-1"],
        ["env", "DB_PASSWORD=correct sk-1", "serve"],
        ["sh", "-c", "exec vllm serve --api-key k sk-1"],
        ["sh", "-c", "exec vllm serve --api-key 'k sk-1'"],
        ["--db=postgres://me:p@sk-1@host/db"],
        ["--db=postgres://me:p/sk-1@host/db"],
    ],
)
def test_no_part_of_a_secret_stays(argv: list[str]) -> None:
    assert "sk-1" not in " ".join(redact_command(argv))


def test_urls_in_the_environment_have_no_password() -> None:
    environment = {"URL": "postgres://me:pw@host/db", "PROXY": "http://token@proxy:80 http://host"}
    assert redact_environment(environment) == {
        "PROXY": "http://REDACTED@proxy:80 http://host",
        "URL": "postgres://REDACTED@host/db",
    }
