# SPDX-License-Identifier: Apache-2.0
"""Who may use the registries of the tests."""

from enum import StrEnum

USERNAME = "user"
PASSWORD = "correct horse"


class Auth(StrEnum):
    """Who may come in: everybody, or USERNAME with PASSWORD, shown to the registry or to its token server."""

    NONE = "none"
    BASIC = "basic"
    TOKEN = "token"
