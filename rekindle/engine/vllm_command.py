# SPDX-License-Identifier: Apache-2.0
"""Read the command of vLLM's server: through wrappers, with abbreviations and its `--config` file.

After `FlexibleArgumentParser` in vllm/utils/argparse_utils.py of 0.32: underscores in an option's name are
dashes, up to the first dot; an option may be abbreviated; the last one counts; `--config FILE` puts the
options of a YAML file before those of the command line, which therefore win.
"""

import itertools
import json
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from msgspec import Struct

from rekindle.command_line import UnclearCommand, Unwrapped, directory_of, unwrap
from rekindle.errors import UsageError

_API_SERVER = "vllm.entrypoints.openai.api_server"
_API_SERVER_FILE = "vllm/entrypoints/openai/api_server.py"
_CLI = frozenset({"vllm", "vllm.entrypoints.cli.main"})
_CONFIG_LIMIT_BYTES = 1 << 20
_REMEDY = "start the server directly, without a shell: rekindle … -- vllm serve MODEL …"
_SHORTEST_CHARACTERS = 4  # of an abbreviation, with its dashes


class ServerCommand(Struct, frozen=True, kw_only=True):
    """The command of a server.

    `words` are the options and arguments that vLLM parses, those of its config file first. `given` are
    those on the command line only. `unwrapped` is the command without its wrappers.
    """

    words: tuple[str, ...]
    given: tuple[str, ...]
    unwrapped: Unwrapped

    def option(self, name: str) -> str | None:
        """Return the value of a long option, the last if it is repeated; None if there is none."""
        found = self.values(name)
        return found[0] if found else None

    def has(self, name: str) -> bool:
        """Tell whether a long option is given, with a value or without."""
        return any(_is_option(word.partition("=")[0], name) for word in self.words)

    def values(self, name: str) -> list[str] | None:
        """Return the values of a long option that may take several; None if it is not given."""
        found: list[str] | None = None
        for number, word in enumerate(self.words):
            key, equals, value = word.partition("=")
            if not _is_option(key, name):
                continue
            if equals:
                found = [value]
            elif values := list(itertools.takewhile(_is_value, self.words[number + 1 :])):
                found = values
        return found

    def every(self, name: str) -> list[str]:
        """Return the values of an option that may be repeated."""
        found = []
        for number, word in enumerate(self.words):
            key, equals, value = word.partition("=")
            if _is_option(key, name):
                found += [value] if equals else list(self.words[number + 1 : number + 2])
        return found

    def count(self, name: str, short: str) -> int:
        """Return the number that an option gives, by its long or short name; 1 if it gives none."""
        found = 1
        for number, word in enumerate(self.words):
            key, equals, value = word.partition("=")
            if key == short or _is_option(key, name):
                given = value if equals else "".join(self.words[number + 1 : number + 2])
                found = int(given) if given.isascii() and given.isdecimal() else 1
        return found

    @property
    def gpus(self) -> int:
        """The number of GPUs that a replica of the model is spread over."""
        return self.count("--tensor-parallel-size", "-tp") * self.count("--pipeline-parallel-size", "-pp")

    @property
    def model(self) -> str | None:
        """The model: an option, or the word after `serve`."""
        first = self.given[0] if self.given and not self.given[0].startswith("-") else None
        is_module = _API_SERVER in self.unwrapped.argv or not first
        return self.option("--model") if is_module else first

    def api_keys(self) -> tuple[str, ...]:
        """Return the keys of which the server requires one; none if it requires no key.

        As in vllm/entrypoints/serve/middleware/register.py of 0.32: the option wins, and empty keys do not
        count.
        """
        given = self.values("--api-key")
        keys = given or [self.unwrapped.environment.get("VLLM_API_KEY", "")]
        return tuple(key for key in keys if key)


def read(argv: Sequence[str], environment: Mapping[str, str]) -> ServerCommand | None:
    """Return the command of vLLM's server; None if the command starts another program.

    Raises UsageError if that, or what the server is told, cannot be known without running it.
    """
    try:
        command = unwrap(argv, environment)
    except UnclearCommand as unclear:
        if not any("vllm" in word for word in argv):
            return None
        raise UsageError(
            f"cannot tell which server {argv[0]} starts", cause=str(unclear), hint=_REMEDY
        ) from None
    given = _server_words(command.argv)
    if given is None:
        return None
    words = given
    if "--config" in given:  # in one word, `--config=FILE`, vLLM ignores it
        at = given.index("--config")
        if at + 1 >= len(given):
            raise UsageError("--config names no file", hint="write --config FILE.yaml")
        path = Path(directory_of(command), given[at + 1])
        words = (*_from_file(path), *given[:at], *given[at + 2 :])
    return ServerCommand(words=words, given=given, unwrapped=command)


def is_server(argv: Sequence[str], environment: Mapping[str, str] | None = None) -> bool:
    """Tell whether a command starts vLLM's server, as far as that can be told."""
    try:
        return _server_words(unwrap(argv, environment or {}).argv) is not None
    except UnclearCommand:
        return False


def without_api_key(argv: Sequence[str]) -> list[str]:
    """Return an unwrapped command without the option --api-key and its values, if it is vLLM's server."""
    if _server_words(argv) is None:
        return list(argv)
    found: list[str] = []
    drops = False
    for word in argv:
        if word.startswith("--"):
            drops = _is_option(word.partition("=")[0], "--api-key")
        if not drops or (found and not _is_value(word) and not word.startswith("--")):
            found.append(word)
        drops = drops and "=" not in word
    return found


def _server_words(argv: Sequence[str]) -> tuple[str, ...] | None:
    """Return the words that vLLM's server parses; None if this is another program."""
    words = list(argv)
    if words and posixpath.basename(words[0]).startswith("python"):
        del words[0]
        while words and words[0].startswith("-") and words[0] not in {"-m", "-c", "-"}:
            del words[: 2 if words[0] in {"-W", "-X"} else 1]
        if words[:1] == ["-m"]:
            module = words[1] if len(words) > 1 else ""
            if module == _API_SERVER:
                return tuple(words[2:])
            return tuple(words[3:]) if module in _CLI and words[2:3] == ["serve"] else None
        if words and words[0].endswith(f"/{_API_SERVER_FILE}"):
            return tuple(words[1:])
    if len(words) > 1 and posixpath.basename(words[0]) == "vllm" and words[1] == "serve":
        return tuple(words[2:])
    return None


def _is_option(word: str, name: str) -> bool:
    """Tell whether a word names a long option, perhaps abbreviated as argparse allows.

    No option of vLLM 0.32 is the beginning of one that we ask for, and argparse refuses what is ambiguous.
    """
    if not word.startswith("--") or "." in word:
        return False
    key = word.replace("_", "-")
    return key == name or (len(key) >= _SHORTEST_CHARACTERS and name.startswith(key))


def _is_value(word: str) -> bool:
    return not word.startswith("-") or word == "-" or " " in word


def _from_file(path: Path) -> Iterator[str]:
    """Yield the options of a config file as words. Raises UsageError."""
    import yaml

    if path.suffix not in {".yaml", ".yml"}:
        raise UsageError(
            f"cannot read --config {path}",
            cause="vLLM only reads .yaml and .yml files",
            hint="rename the file, and write --config FILE.yaml",
        )
    try:
        with open(path, "rb") as file:
            content = file.read(_CONFIG_LIMIT_BYTES + 1)
        if len(content) > _CONFIG_LIMIT_BYTES:
            raise ValueError(f"more than {_CONFIG_LIMIT_BYTES} bytes")
        document = yaml.safe_load(content)
        if not isinstance(document, dict):
            raise TypeError("not a mapping of options")
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        # The text of a YAML error quotes the file, which may hold a key.
        cause = error.strerror if isinstance(error, OSError) else type(error).__name__
        raise UsageError(
            f"cannot read --config {path}",
            cause=str(cause),
            hint="name a YAML file with an object whose names are options of vLLM",
        ) from None
    for key, value in document.items():
        match value:
            case bool():
                yield f"--{key}" if value else f"--no-{key}"
            case list():
                if value:
                    yield f"--{key}"
                    yield from map(str, value)
            case dict():
                yield f"--{key}"
                yield json.dumps(value, default=str)
            case _:
                yield f"--{key}"
                yield str(value)
