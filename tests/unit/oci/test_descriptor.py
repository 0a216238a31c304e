# SPDX-License-Identifier: Apache-2.0
"""What descriptors say of an image's parts."""

import pytest

from oci import media_types
from oci.descriptor import Descriptor, cache_among, manifests_of, platform_of
from rekindle.digest import Digest
from rekindle.errors import FormatError
from rekindle.fields import Fields

INDEX = Digest.of_bytes(b"index")
PROCESS = Descriptor(
    media_type=media_types.MANIFEST,
    digest=Digest.of_bytes(b"process"),
    size=7,
    artifact_type=media_types.PROCESS,
)
CACHE = Descriptor(
    media_type=media_types.MANIFEST,
    digest=Digest.of_bytes(b"cache"),
    size=5,
    annotations={media_types.ROLE: media_types.CACHE_ROLE},
)


@pytest.mark.parametrize(
    ("machine", "architecture"), [("x86_64", "amd64"), ("aarch64", "arm64"), ("riscv64", "riscv64")]
)
def test_a_platform_has_the_names_of_the_specification(machine: str, architecture: str) -> None:
    assert platform_of(machine) == {"architecture": architecture, "os": "linux"}


def index_of(*manifests: Descriptor) -> Fields:
    return Fields({"manifests": [each.to_json() for each in manifests]}, "index")


def test_an_index_names_a_few_manifests() -> None:
    assert manifests_of(index_of(PROCESS, CACHE)) == [PROCESS, CACHE]
    with pytest.raises(FormatError, match="a list of at most 16"):
        manifests_of(index_of(*[PROCESS] * 17))


def test_a_snapshot_has_one_kernel_cache_or_none() -> None:
    assert cache_among([PROCESS, CACHE], INDEX) == CACHE
    assert cache_among([PROCESS], INDEX) is None
    with pytest.raises(FormatError, match=f"{INDEX} lists 2 kernel caches"):
        cache_among([CACHE, PROCESS, CACHE], INDEX)
