# SPDX-License-Identifier: Apache-2.0
"""`rekindle completion`: print what makes a shell complete our commands.

The options are those of the commands' own parsers, so they cannot differ from these.
"""

import argparse
import importlib
import pkgutil
import shlex
from collections.abc import Mapping, Sequence

from msgspec import Struct

import cli
from cli import _arguments

_NAMES = "rekindle ps --quiet 2>/dev/null"


class _ParsedError(Exception):
    """Carries the parser of a command out of its `main`."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        super().__init__()
        self.parser = parser


class _Words(Struct, frozen=True, kw_only=True):
    """The words of a command: its options, the choices of those that have some, and which take a path.

    `values` are the options that take any other value. `operand` is what the first operand is.
    """

    options: Sequence[str]
    choices: Mapping[str, Sequence[str]]
    paths: Sequence[str]
    values: Sequence[str]
    operand: str


def main(words: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="rekindle completion",
        formatter_class=_arguments.Formatter,
        description="Print what makes a shell complete the commands of rekindle. For bash: "
        "source <(rekindle completion bash). For zsh, after compinit: source <(rekindle completion zsh).",
    )
    parser.add_argument("shell", choices=["bash", "zsh"], metavar="SHELL", help="bash or zsh")
    args = parser.parse_args(words)
    print(_script(commands(), args.shell), end="")
    return 0


def commands() -> dict[str, _Words]:
    """Return the words of every command."""
    modules = [each.name for each in pkgutil.iter_modules(cli.__path__) if not each.name.startswith("_")]
    return {name.replace("_", "-"): _words(_parser(name)) for name in modules}


def _parser(name: str) -> argparse.ArgumentParser:
    """Return the parser that a command's `main` builds; it does nothing else before it parses."""

    def carry(parser: argparse.ArgumentParser, *_: object) -> None:
        raise _ParsedError(parser)

    module = importlib.import_module(f"cli.{name}")
    kept = argparse.ArgumentParser.parse_args, argparse.ArgumentParser.parse_intermixed_args
    argparse.ArgumentParser.parse_args = carry  # type: ignore[assignment, method-assign]
    argparse.ArgumentParser.parse_intermixed_args = carry  # type: ignore[assignment, method-assign]
    try:
        module.main([])
    except _ParsedError as parsed:
        return parsed.parser
    finally:
        argparse.ArgumentParser.parse_args, argparse.ArgumentParser.parse_intermixed_args = kept  # type: ignore[method-assign]
    raise AssertionError(f"{name} reads no command line")


def _words(parser: argparse.ArgumentParser) -> _Words:
    options: list[str] = []
    choices: dict[str, Sequence[str]] = {}
    paths: list[str] = []
    values: list[str] = []
    operand = ""
    for action in parser._actions:
        if action.help == argparse.SUPPRESS:
            continue
        options += action.option_strings
        if not action.option_strings:
            if action.choices:
                choices[""] = [str(choice) for choice in action.choices]
            operand = operand or str(action.metavar)
        elif action.choices:
            choices |= dict.fromkeys(action.option_strings, tuple(map(str, action.choices)))
        elif action.nargs != 0:
            is_path = action.metavar in {"FILE", "DIR", "PUB", "KEY"}
            (paths if is_path else values).extend(action.option_strings)
    return _Words(options=options, choices=choices, paths=paths, values=values, operand=operand)


def _script(found: Mapping[str, _Words], shell: str) -> str:
    lines = ["# Written by `rekindle completion`; zsh reads it with bashcompinit."]
    if shell == "zsh":
        lines.append("autoload -U +X bashcompinit && bashcompinit")
    lines += [
        "_rekindle() {",
        "    local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]} each",
        "    COMPREPLY=()",
        "    if ((COMP_CWORD == 1)); then",
        f"        {_reply(' '.join([*found, '--help', '--version']))}",
        "        return",
        "    fi",
        '    for each in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do',
        '        [[ $each == -- ]] && { COMPREPLY=($(compgen -f -- "$word")); return; }',
        "    done",
        "    case ${COMP_WORDS[1]}:$before in",
    ]
    for name, words in found.items():
        for option, choices in words.choices.items():
            if option:
                lines.append(f"        {name}:{option}) {_reply(' '.join(choices))}; return ;;")
        if words.paths:
            pattern = "|".join(f"{name}:{option}" for option in words.paths)
            lines.append(f'        {pattern}) COMPREPLY=($(compgen -f -- "$word")); return ;;')
        if words.values:
            lines.append(f"        {'|'.join(f'{name}:{option}' for option in words.values)}) return ;;")
    lines += ["    esac", "    case ${COMP_WORDS[1]} in"]
    for name, words in found.items():
        lines.append(f"        {name})")
        lines.append(f"            if [[ $word == -* ]]; then {_reply(' '.join(words.options))}")
        if "" in words.choices:
            lines.append(f"            else {_reply(' '.join(words.choices['']))}")
        elif words.operand == "NAME":
            lines.append(f'            else COMPREPLY=($(compgen -W "$({_NAMES})" -- "$word"))')
        else:
            lines.append('            else COMPREPLY=($(compgen -f -- "$word"))')
        lines.append("            fi ;;")
    lines += ["    esac", "}", "complete -o filenames -F _rekindle rekindle", ""]
    return "\n".join(lines)


def _reply(words: str) -> str:
    return f'COMPREPLY=($(compgen -W {shlex.quote(words)} -- "$word"))'
