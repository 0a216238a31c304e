# SPDX-License-Identifier: Apache-2.0
"""What a start reads is written down in few bytes, and a text that means nothing is refused."""

import pytest

from rekindle.errors import FormatError
from rekindle.node.start_reads import FILES_LIMIT, PARTS_LIMIT, StartRead, decode, encode

READS = [
    StartRead("/usr/lib/a.so", ((0, 4096), (1 << 30, 7))),
    StartRead("/usr/lib/a.so.1"),
    StartRead("/usr/lib/with a space", ((5, 1),)),
    StartRead("/x"),
    StartRead("/x"),
    StartRead("/ü/文"),
]


def test_what_is_written_is_read() -> None:
    assert decode(encode(READS)) == READS
    assert decode(encode([])) == []


def test_what_paths_share_is_written_once() -> None:
    assert encode(READS[:2]) == "0 /usr/lib/a.so\t0+4096\t1073741824+7\n13 .1"


@pytest.mark.parametrize(
    "text",
    [
        *("x", "0", "0 x", "0 ", " /x", "-1 /x", "1.0 /x", "0 /x\n", "0 /x\n\n0 /y", "0 /x\n0 y"),
        *("0 /x\t", "0 /x\t1", "0 /x\t1+", "0 /x\t+1", "0 /x\t1+2+3", "0 /x\t-1+2", "0 /x\t1+2\t"),
        *("0 /\0", "0 /" + "x" * 4096, "9" * 5000 + " /x", "0 /x\t0+" + "9" * 5000, "0 /x\t٣+٣"),
        *("0 /x\n" * FILES_LIMIT + "0 /x", "0 /x" + "\t0+1" * (PARTS_LIMIT + 1)),
    ],
    ids=lambda text: repr(text)[:24],
)
def test_a_text_that_means_nothing_is_refused(text: str) -> None:
    with pytest.raises(FormatError):
        decode(text)
