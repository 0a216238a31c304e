# SPDX-License-Identifier: Apache-2.0
"""`rekindle generate-key-pair`: generate a key pair for signing, in cosign's format."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from cli import _signing
from oci.trust.keys import ALGORITHMS, PrivateKey
from rekindle.errors import UsageError
from rekindle.files import write_atomically


def main(words: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="rekindle generate-key-pair",
        description="Generate a key pair, PREFIX.key and PREFIX.pub, as `cosign generate-key-pair` does. "
        "The private key is encrypted with $COSIGN_PASSWORD, or with a password that you type.",
    )
    parser.add_argument(
        "--output-key-prefix",
        default="cosign",
        metavar="PREFIX",
        help="prefix of the file names (default: cosign)",
    )
    parser.add_argument(
        "--algorithm", choices=ALGORITHMS, default="p-256", help="of the key (default: p-256, as cosign)"
    )
    args = parser.parse_args(words)
    private, public = Path(f"{args.output_key_prefix}.key"), Path(f"{args.output_key_prefix}.pub")
    for path in (private, public):
        if path.exists():
            raise UsageError(f"{path} exists already", hint="choose another --output-key-prefix")
    key = PrivateKey.generate(args.algorithm)
    try:
        key.write(private, _signing.password(twice=True))
        write_atomically(public, key.public.to_pem())
    except OSError as error:
        raise UsageError(f"cannot write {private}", cause=str(error)) from None
    print(f"{private}\n{public}")
    return 0
