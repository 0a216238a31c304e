# SPDX-License-Identifier: Apache-2.0
"""seen.json: the newest creation time that was seen of each tag, to refuse older images.

Tags of registries and layout directories mean the same for all users of a host, so root's are remembered for
the host: in $REKINDLE_STATE, /var/lib/rekindle by default. Other users', and those of the local store, are in
$REKINDLE_HOME, and so are all where the host's cannot be written.
"""

import json
import os
import stat
from datetime import UTC, datetime
from pathlib import Path

from oci.reference import LayoutReference, Reference, RegistryReference
from oci.trust.verifier import Trust
from rekindle.errors import FormatError, TrustError
from rekindle.files import locked, write_atomically
from rekindle.home import Home

_SEEN_LIMIT = 10_000


def refuse_older(reference: Reference, home: Home, trust: Trust) -> None:
    """Remember the newest signed creation time of a tag. Raises TrustError for an image that is older."""
    if isinstance(reference, RegistryReference) and reference.digest is not None:
        return
    tag = f"{reference.policy_name}:{reference.tag.rpartition(':')[2]}"
    own = home.root / "seen.json"
    of_host = None if isinstance(reference, LayoutReference) and reference.in_store else _host_directory()
    with locked((of_host or home.root) / "lock"):
        path = of_host / "seen.json" if of_host else own
        seen = _seen(path)
        known = [seen.get(tag), _seen(own).get(tag) if of_host else None]
        newest = max((each for each in known if each is not None), default=None)
        if newest is not None and (trust.created is None or trust.created.isoformat() < newest):
            made = f"{trust.created:%Y-%m-%d %H:%M}" if trust.created else "at an unknown time"
            raise TrustError(
                f"{reference} is older than an image seen before under this tag",
                cause=f"made {made}; the newest one seen was made {newest}",
                hint="--allow-rollback, if this is intended",
            )
        if trust.created is not None and trust.created.isoformat() != seen.get(tag):
            seen[tag] = trust.created.isoformat()
            kept = dict(list(seen.items())[-_SEEN_LIMIT:])
            write_atomically(path, json.dumps(kept, indent=1).encode(), mode=0o600)


def _host_directory() -> Path | None:
    """Return the directory of what root remembers for the host; None if it is not ours to write."""
    given = os.environ.get("REKINDLE_STATE")
    if os.geteuid() != 0 and not given:
        return None
    path = Path(given or "/var/lib/rekindle")
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        status = path.lstat()
    except OSError:  # a read-only file system, or no /var/lib
        return None
    private = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o022
    return path if private and os.access(path, os.W_OK | os.X_OK) else None


def _seen(path: Path) -> dict[str, str]:
    try:
        content = json.loads(path.read_bytes())
        return {
            str(tag): datetime.fromisoformat(text).astimezone(UTC).isoformat()
            for tag, text in content.items()
        }
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, AttributeError) as error:
        raise FormatError(f"{path} is malformed", cause=str(error), hint="remove it") from None
