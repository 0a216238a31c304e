# SPDX-License-Identifier: Apache-2.0
"""Find which of the files that a server has read may hold a secret.

Of these, a record has no digest that could be compared with a guess: docs/adr/0034-secret-files.md. It costs
little to take a file for secret that is not: it is compared later, once the process is restored.
"""

import os
import posixpath
import re
from collections.abc import Collection

from rekindle.secrets import forms
from rekindle.secrets.redact import is_secret_name, url_passwords

# Of container runtimes and the kubelet; of systemd.exec(5), LoadCredential=; by convention.
PLACES = re.compile(r"/run/secrets/|/run/(?:user/[0-9]+/)?credentials/[^/]+/|/etc/secrets/")
# Issued for each pod, for an hour or so; clients read them again. And what RHEL mounts into all containers.
_ISSUED_ANEW = (
    *("/run/secrets/kubernetes.io/", "/run/secrets/eks.amazonaws.com/", "/run/secrets/azure/tokens/"),
    *("/run/secrets/tokens/", "/run/secrets/workload-spiffe-credentials/", "/run/secrets/rhsm/"),
    *("/run/secrets/etc-pki-entitlement/", "/run/secrets/redhat.repo"),
)
_NAMES = re.compile(
    rf"{forms.WORDS_OF_PASSWORDS}|^\.?(?:netrc|pgpass|my\.cnf|npmrc|pypirc|htpasswd|git-credentials)$|^\.env$"
    r"|^(?:token|credentials?)(?:\.\w+)?$|^id_[a-z0-9]+$|\.(?:key|p12|pfx|jks|keystore|env)$",
    re.IGNORECASE,
)
_PUBLIC = {"/etc/passwd"}
_PROGRAMS = ("/bin/", "/sbin/", "/usr/bin/", "/usr/sbin/", "/usr/local/bin/")
_OF_A_FILE = re.compile(r"[-_]?(?:FILE|PATH)$", re.IGNORECASE)
_IN_TEXT = re.compile(rb"""["']?([\w.-]{1,80})["']?[ \t]*[:=][ \t]*["']?([^\s"',]{1,200})""")
_HINT = re.compile(rb"pass|pwd|secret|pw|://", re.IGNORECASE)
_MEMORY_FILE_SYSTEMS = {"tmpfs", "ramfs"}


def is_issued_anew(path: str) -> bool:
    """Tell whether a platform gives every start another file here, which clients read again."""
    return path.startswith(_ISSUED_ANEW)


def is_secret(path: str, named_by: Collection[str], content: bytes | None) -> bool:
    """Tell whether a file may hold a secret.

    It may by its place, its name, or that of an option or a variable that names it. `content` is that of a
    file that somebody has named: it may hold the assignment of a password, or a URL with one.
    """
    if path in _PUBLIC or path.startswith(_PROGRAMS):
        return False
    if PLACES.match(path) or _NAMES.search(posixpath.basename(path)) or _is_mounted_secret(path):
        return True
    if any(is_secret_name(_OF_A_FILE.sub("", name.lstrip("-"))) for name in named_by):
        return True
    return content is not None and _holds_password(content)


def _is_mounted_secret(path: str) -> bool:
    """Tell whether a file is in memory and cannot be written there, as Kubernetes mounts secrets."""
    try:
        if not os.statvfs(path).f_flag & os.ST_RDONLY:
            return False
        device = os.stat(path).st_dev  # noqa: PTH116
        with open("/proc/self/mountinfo", errors="surrogateescape") as mounts:
            for line in mounts:
                fields, _, kind = line.partition(" - ")
                if fields.split(" ")[2] == f"{os.major(device)}:{os.minor(device)}":
                    return kind.split(" ")[0] in _MEMORY_FILE_SYSTEMS
    except (OSError, ValueError):
        pass
    return False


def _holds_password(content: bytes) -> bool:
    if not _HINT.search(content):
        return False
    if any(url_passwords(line) for line in content.decode(errors="replace").splitlines() if "://" in line):
        return True
    pairs = (
        (each[1].decode(errors="replace"), each[2].decode(errors="replace"))
        for each in _IN_TEXT.finditer(content)
    )
    return any(forms.names_password(name) and forms.is_secret_value(name, value) for name, value in pairs)
