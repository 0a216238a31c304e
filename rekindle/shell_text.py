# SPDX-License-Identifier: Apache-2.0
"""Read the text of `sh -c TEXT` as a sequence of simple commands, without a shell.

What POSIX calls a simple command (XCU 2.9.1) is read: words, quotes, assignments, redirections, `$NAME`,
`${NAME}`, `${NAME:-word}`, `$1` and `"$@"`. Everything whose result only a shell knows is refused by name:
command substitution, pipes, patterns, compound commands. Commands that come before the last one must be
harmless.
"""

import posixpath
import re
from collections.abc import Callable, Mapping, Sequence

TEXT_LIMIT_CHARACTERS = 1 << 20

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_BRACED = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*|[0-9@*])(?:(:?-)([^${}`\"'\\]*))?\}")
_SIMPLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*|[0-9@*]")
_NOTHING = re.compile(r"(?:[ \t\r\n;]|#[^\n]*)*")
_ASSIGNMENT = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=(.*)", re.DOTALL)
_OPERATORS = {
    "|": "a pipe",
    "&": "a background job",
    "(": "a subshell",
    ")": "a subshell",
    "`": "a command substitution",
}
_PATTERNS = {"*": "a pattern", "?": "a pattern", "[": "a pattern", "{": "a brace expansion"}
_KEYWORDS = frozenset({"if", "for", "while", "until", "case", "{", "!", "function", "[[", "select", "eval"})
_HARMLESS = frozenset({"set", "ulimit", "umask", "echo", "true", ":", "printf"})


class UnclearCommand(Exception):  # noqa: N818 - it is an answer, and the caller has its own error
    """A command whose effect cannot be told without running it; the text says why."""


def last_command(
    text: str, environment: Mapping[str, str], positional: Sequence[str] = ()
) -> tuple[list[str], dict[str, str], str]:
    """Return the words of the last command of a text, the variables set for it, and its directory ("": ours).

    `positional` are the words after the text: `$0`, `$1`, …. Raises UnclearCommand.
    """
    if len(text) > TEXT_LIMIT_CHARACTERS:
        raise UnclearCommand("the shell's text is too long")
    shell = _Shell(environment, positional)
    reader = _Reader(text, shell.value)
    while (words := reader.command() or []) and not reader.at_end():
        shell.run(words)
    assigned = dict(shell.exported)
    while words and (found := _ASSIGNMENT.fullmatch(words[0])):
        assigned[found[1]] = found[2]
        del words[0]
    while words and words[0] in {"exec", "command"}:
        del words[0]
        if words and words[0].startswith("-"):
            raise UnclearCommand(f"{words[0]} of the shell's exec or command")
    if not words or words[0] in _KEYWORDS:
        raise UnclearCommand(
            f"a compound command ({words[0]})" if words else "no command in the shell's text"
        )
    return words, assigned, shell.directory


class _Shell:
    """The variables and the directory of a shell between simple commands."""

    def __init__(self, environment: Mapping[str, str], positional: Sequence[str]) -> None:
        self._variables = dict(environment)
        self._positional = list(positional)
        self.exported: dict[str, str] = {}
        self.directory = ""

    def value(self, name: str) -> str | list[str] | None:
        """Return the value of a variable, None if it is not set; for `@` and `*`, the positional words."""
        if name in {"@", "*"}:
            return self._positional[1:]
        if name.isdecimal():
            return self._positional[int(name)] if int(name) < len(self._positional) else None
        return self._variables.get(name)

    def run(self, words: Sequence[str]) -> None:
        """Apply a command that comes before the last one. Raises UnclearCommand unless it is harmless."""
        if all(_ASSIGNMENT.fullmatch(word) for word in words):
            self._assign(words, export=False)
        elif words[0] == "export" and all(_ASSIGNMENT.fullmatch(word) for word in words[1:]):
            self._assign(words[1:], export=True)
        elif words[0] == "cd" and len(words) == 2 and not words[1].startswith("-"):
            self.directory = posixpath.join(self.directory, words[1])
        elif words[0] not in _HARMLESS:
            raise UnclearCommand(f"`{words[0]}` runs before it in the shell")

    def _assign(self, words: Sequence[str], *, export: bool) -> None:
        for word in words:
            name, _, value = word.partition("=")
            if export or name in self._variables:
                self.exported[name] = value
            self._variables[name] = value


class _Reader:
    """Reads one command after the other."""

    def __init__(self, text: str, value: Callable[[str], str | list[str] | None]) -> None:
        self._text = text.replace("\\\n", "")
        self._at = 0
        self._value = value
        self._words: list[str] = []
        self._word: str | None = None
        self._drops_next = False  # the target of a redirection

    def at_end(self) -> bool:
        """Tell whether no command is left."""
        return _NOTHING.fullmatch(self._text, self._at) is not None

    def command(self) -> list[str] | None:
        """Return the words of the next command; None at the end. Raises UnclearCommand."""
        while True:
            ended = self._read_until_end()
            words, self._words = self._words, []
            if self._drops_next:
                raise UnclearCommand("a redirection without a target")
            if words or ended:
                return words or None

    def _read_until_end(self) -> bool:
        """Read the words of a command; return whether the text has ended."""
        while self._at < len(self._text):
            character = self._text[self._at]
            self._at += 1
            match character:
                case " " | "\t" | "\r":
                    self._finish()
                case "\n" | ";":
                    self._finish()
                    return False
                case "&" if self._text.startswith("&", self._at) and not self._text.startswith(
                    "&>", self._at
                ):
                    self._at += 1
                    self._finish()
                    return False
                case "#" if self._word is None:
                    end = self._text.find("\n", self._at)
                    self._at = len(self._text) if end < 0 else end
                case ">" | "<":
                    self._redirect(character)
                case "'":
                    self._add(self._until("'"))
                case '"':
                    self._quoted()
                case "\\":
                    self._add(self._text[self._at : self._at + 1])
                    self._at += 1
                case "$":
                    self._expand(quoted=False)
                case "~" if self._word is None:
                    self._add(self._home())
                case _ if character in _OPERATORS:
                    raise UnclearCommand(f"{_OPERATORS[character]} in the shell's text")
                case _ if character in _PATTERNS:
                    raise UnclearCommand(f"{_PATTERNS[character]} in the shell's text")
                case _:
                    self._add(character)
        self._finish()
        return True

    def _add(self, text: str) -> None:
        self._word = (self._word or "") + text

    def _finish(self) -> None:
        if self._word is None:
            return
        if not self._drops_next:
            self._words.append(self._word)
        self._word, self._drops_next = None, False

    def _until(self, quote: str) -> str:
        end = self._text.find(quote, self._at)
        if end < 0:
            raise UnclearCommand("an open quote in the shell's text")
        found, self._at = self._text[self._at : end], end + 1
        return found

    def _redirect(self, sign: str) -> None:
        if self._word is not None and self._word.isdecimal():
            self._word = None  # the number of a descriptor
        self._finish()
        if self._text[self._at : self._at + 1] in {"<", "("}:
            raise UnclearCommand("a here-document or a process substitution in the shell's text")
        if sign == ">" and self._text[self._at : self._at + 1] in {">", "|"}:
            self._at += 1
        if self._text[self._at : self._at + 1] == "&":
            self._at += 1
        self._drops_next = True

    def _home(self) -> str:
        following = self._text[self._at : self._at + 1]
        home = self._value("HOME")
        if following not in {"", "/", " ", "\n", "\t"} or not isinstance(home, str) or not home:
            raise UnclearCommand("a home directory (~) in the shell's text")
        return home

    def _quoted(self) -> None:
        whole = re.compile(r'\$(?:@|\{@\})"(?=[\s;&]|\Z)').match(self._text, self._at)
        if whole and self._word is None:
            self._at = whole.end()
            self._words += self._value("@") or []
            return
        self._add("")
        while True:
            character = self._text[self._at : self._at + 1]
            self._at += 1
            match character:
                case "":
                    raise UnclearCommand("an open quote in the shell's text")
                case '"':
                    return
                case "\\" if self._text[self._at : self._at + 1] in {"$", "`", '"', "\\"}:
                    self._add(self._text[self._at])
                    self._at += 1
                case "$":
                    self._expand(quoted=True)
                case "`":
                    raise UnclearCommand("a command substitution in the shell's text")
                case _:
                    self._add(character)

    def _expand(self, *, quoted: bool) -> None:
        """Read what follows a `$`: a parameter, or nothing special."""
        following = self._text[self._at : self._at + 1]
        default, unless_empty = "", False
        if found := _BRACED.match(self._text, self._at):
            default, unless_empty = found[3] or "", found[2] == ":-"
        elif following in {"{", "(", "'", "?", "$", "!", "#", "-"} or (following == '"' and not quoted):
            raise UnclearCommand(f"the expansion ${following} in the shell's text")
        elif not (found := _SIMPLE.match(self._text, self._at)):
            self._add("$")
            return
        name = found[1] if found.re is _BRACED else found[0]
        self._at = found.end()
        value = self._value(name)
        if isinstance(value, list):
            if quoted:
                raise UnclearCommand(f"${name} within quotes in the shell's text")
            value = " ".join(value)
        if value is None or (unless_empty and not value):
            value = default
        if quoted:
            self._add(value)
            return
        if set(value) & {"*", "?", "["}:
            raise UnclearCommand(f"${name} holds a pattern")
        first, *others = re.split(r"[ \t\n]+", value)
        if first:
            self._add(first)
        for piece in others:
            self._finish()
            if piece:
                self._add(piece)
