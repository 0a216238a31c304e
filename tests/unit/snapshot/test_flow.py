# SPDX-License-Identifier: Apache-2.0
"""What a snapshot says of itself that its parts do not tell."""

from msgspec import structs

from oci.cache.inventory import Target
from snapshot.flow import _targets
from tests.fakes.nodes import H100, L4
from tests.samples.record import RECORD


def test_a_cache_that_does_not_tell_its_hardware_is_for_the_gpus_that_the_server_used() -> None:
    """Otherwise MCV refuses it everywhere, as one for the architecture `unknown`."""
    assert _targets(structs.replace(RECORD, process=structs.replace(RECORD.process, gpus=()))) == []
    for gpus, arch in ((L4, "89"), (H100, "90")):
        used = structs.replace(RECORD.process, gpus=tuple(gpu.uuid for gpu in gpus.gpus))
        node = structs.replace(RECORD.node, devices=gpus)
        record = structs.replace(RECORD, node=node, process=used)
        assert _targets(record) == [Target(backend="cuda", arch=arch, warp_size=32)]
        amd = tuple(structs.replace(gpu, vendor="amd", arch="gfx942", warp_size=64) for gpu in gpus.gpus)
        record = structs.replace(record, node=structs.replace(node, devices=structs.replace(gpus, gpus=amd)))
        assert _targets(record) == [Target(backend="hip", arch="gfx942", warp_size=64)]
