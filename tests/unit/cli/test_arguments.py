# SPDX-License-Identifier: Apache-2.0
"""Test the options that several commands share."""

import argparse
from collections.abc import Callable

from cli import _arguments


def _dests(add: Callable[[argparse.ArgumentParser], None]) -> set[str]:
    parser = argparse.ArgumentParser(add_help=False)
    add(parser)
    return {action.dest for action in parser._actions}


def test_each_option_of_trust_and_of_registries_is_handed_on() -> None:
    assert set(_arguments.TRUST) == _dests(_arguments.add_trust)
    assert set(_arguments.REGISTRY) == _dests(_arguments.add_registry)


def test_options_are_handed_on_as_they_were_given() -> None:
    parser = argparse.ArgumentParser()
    _arguments.add_trust(parser)
    _arguments.add_registry(parser)
    given = ["--verify-key", "a.pub", "--verify-key", "b.pub", "--certificate-identity-regexp", "x.*"]
    given += ["--ca-roots", "roots.pem", "--allow-rollback", "--mirror", "http://m", "--limit-rate", "80M"]
    args = parser.parse_args(given)
    words = _arguments.option_words(args, (*_arguments.TRUST, *_arguments.REGISTRY))
    assert parser.parse_args(words) == args
    assert _arguments.option_words(parser.parse_args([]), _arguments.TRUST) == []
