# SPDX-License-Identifier: Apache-2.0
"""The key of this machine. It signs what is made here, and is trusted in the local store only."""

from oci.trust.keys import PrivateKey, PublicKey
from rekindle.files import locked, write_atomically
from rekindle.home import Home


def machine_public(home: Home) -> PublicKey | None:
    """Return the public key of this machine, or None if it has none yet."""
    path = home.root / "machine.pub"
    return PublicKey.read(path) if path.exists() else None


def machine_key(home: Home) -> PrivateKey:
    """Return the key of this machine, and make one if there is none. It never leaves $REKINDLE_HOME."""
    path = home.root / "machine.key"
    with locked(home.root / "lock"):
        if not path.exists():
            write_atomically(path, PrivateKey.generate().to_pem(), mode=0o600)
        key = PrivateKey.read(path, b"")
        public = home.root / "machine.pub"
        if not public.exists():  # it is written second: the process that made the key may have been killed
            write_atomically(public, key.public.to_pem())
        return key
