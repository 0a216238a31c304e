# SPDX-License-Identifier: Apache-2.0
"""seen.json: the newest creation time that was seen of each tag, to refuse older images."""

import json
from datetime import UTC, datetime
from pathlib import Path

from oci.reference import Reference, RegistryReference
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
    path = home.root / "seen.json"
    with locked(home.root / "lock"):
        seen = _seen(path)
        newest = seen.get(tag)
        if newest is not None and (trust.created is None or trust.created.isoformat() < newest):
            made = f"{trust.created:%Y-%m-%d %H:%M}" if trust.created else "at an unknown time"
            raise TrustError(
                f"{reference} is older than an image seen before under this tag",
                cause=f"made {made}; the newest one seen was made {newest}",
                hint="--allow-rollback, if this is intended",
            )
        if trust.created is not None and trust.created.isoformat() != newest:
            seen[tag] = trust.created.isoformat()
            kept = dict(list(seen.items())[-_SEEN_LIMIT:])
            write_atomically(path, json.dumps(kept, indent=1).encode(), mode=0o600)


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
