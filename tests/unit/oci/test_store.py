# SPDX-License-Identifier: Apache-2.0
"""A layout directory of the user: what is removed from it, and what odd files in it do."""

import contextlib
import json
import os
from pathlib import Path

import pytest

from oci import image as images
from oci import media_types
from oci.descriptor import Descriptor
from oci.layout import Layout
from oci.reference import LayoutReference, parse
from oci.store import collecting, layout_of, others_can_read
from rekindle.errors import RekindleError
from rekindle.home import Home
from tests.unit.oci.test_layout import build


def attach(layout: Layout, subject: Descriptor) -> Descriptor:
    document = {"schemaVersion": 2, "mediaType": media_types.MANIFEST, "subject": subject.to_json()}
    return layout.put(json.dumps(document).encode(), media_types.MANIFEST)


def reference(text: str) -> LayoutReference:
    found = parse(text)
    assert isinstance(found, LayoutReference)
    return found


def test_the_blobs_of_a_replaced_image_go_and_those_of_others_stay(tmp_path: Path) -> None:
    target, home = reference(f"oci:{tmp_path}/mine:1"), Home(tmp_path / "home")
    layout = layout_of(target, home, create=True)
    theirs = layout.put(b"put here by another tool", "text/plain")
    old, new = build(layout, "old"), build(layout, "new")
    signature = attach(layout, old)
    layout.publish(layout, old, "1", [signature])
    with collecting(layout, target):
        layout.publish(layout, new, "1")
    after = {path.name for path in (layout.root / "blobs/sha256").iterdir()}
    assert theirs.digest.hex in after
    assert {digest.hex for digest in layout.reachable([new])} <= after
    assert old.digest.hex not in after
    assert signature.digest.hex not in after
    assert layout.referrers(old.digest) == []


def test_blobs_that_another_tag_needs_stay(tmp_path: Path) -> None:
    target, home = reference(f"oci:{tmp_path}/mine:1"), Home(tmp_path / "home")
    layout = layout_of(target, home, create=True)
    old = build(layout, "old")
    for tag in ("1", "also"):
        layout.publish(layout, old, tag)
    with collecting(layout, target):
        layout.publish(layout, build(layout, "new"), "1")
    images.load(layout, layout.resolve("also"))


def test_what_could_not_be_collected_is_collected_the_next_time(tmp_path: Path) -> None:
    target, home = reference(f"oci:{tmp_path}/mine:1"), Home(tmp_path / "home")
    layout = layout_of(target, home, create=True)
    old = build(layout, "old")
    layout.publish(layout, old, "1")
    with layout.reading(), collecting(layout, target):
        layout.publish(layout, build(layout, "new"), "1")
    assert (layout.root / "blobs/sha256" / old.digest.hex).exists()
    with collecting(layout, target):
        layout.publish(layout, build(layout, "newer"), "1")
    assert not (layout.root / "blobs/sha256" / old.digest.hex).exists()
    assert not (layout.root / ".garbage").exists()


@pytest.mark.parametrize("name", ["index.json", ".lock", ".reading", ".garbage"])
@pytest.mark.parametrize("what", ["pipe", "link", "directory"])
def test_what_is_no_file_in_a_layout_neither_hangs_nor_is_followed(
    tmp_path: Path, name: str, what: str
) -> None:
    target, home = reference(f"oci:{tmp_path}/mine:1"), Home(tmp_path / "home")
    layout = layout_of(target, home, create=True)
    layout.publish(layout, build(layout, "old"), "1")
    victim = tmp_path / "victim"
    victim.write_text("{}")
    (layout.root / name).unlink(missing_ok=True)
    match what:
        case "pipe":
            os.mkfifo(layout.root / name)
        case "link":
            (layout.root / name).symlink_to(victim)
        case _:
            (layout.root / name).mkdir()
    with contextlib.suppress(RekindleError, OSError), layout.reading():
        layout.resolve("1")
    with contextlib.suppress(RekindleError, OSError), collecting(layout, target):
        layout.publish(layout, build(layout, "new"), "1")
    assert victim.read_text() == "{}"
    if name == "index.json":
        with pytest.raises(RekindleError, match="is not a regular file"):
            layout.resolve("1")


def test_a_directory_that_others_can_read_is_named(tmp_path: Path) -> None:
    target, home = reference(f"oci:{tmp_path}/mine:1"), Home(tmp_path / "home")
    layout_of(target, home, create=True)
    assert others_can_read(target) == ""
    assert others_can_read(reference("name")) == ""
    (tmp_path / "mine").chmod(0o755)
    assert "chmod 700" in others_can_read(target)
