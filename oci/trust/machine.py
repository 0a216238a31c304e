# SPDX-License-Identifier: Apache-2.0
"""The key of this machine, which signs what is made here, for the local store alone."""

from oci.trust.keys import PrivateKey, PublicKey
from rekindle.files import locked, write_atomically
from rekindle.home import Home


def machine_public(home: Home) -> PublicKey | None:
    """The key of this machine, if there is one."""
    path = home.root / "machine.pub"
    return PublicKey.read(path) if path.exists() else None


def machine_key(home: Home) -> PrivateKey:
    """The key of this machine, made if there is none yet. It never leaves $REKINDLE_HOME."""
    path = home.root / "machine.key"
    with locked(home.root / "lock"):
        if not path.exists():
            write_atomically(path, PrivateKey.generate().to_pem(), mode=0o600)
        key = PrivateKey.read(path, b"")
        public = home.root / "machine.pub"
        if not public.exists():  # it is written second: whoever made the key may have been killed before
            write_atomically(public, key.public.to_pem())
        return key
