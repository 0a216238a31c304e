# SPDX-License-Identifier: Apache-2.0
"""A dump of a small process, to try whether CRIU can restore where nothing can be dumped.

The process maps its program and a stack, has unmapped its vDSO and has no descriptor:

    _start: for each word of the auxiliary vector: find AT_SYSINFO_EHDR, the vDSO
            munmap(the vDSO and the pages of variables before it)
    again:  pause(); goto again

So the dump fits all x86-64 processors and OS kernels: it has no extended registers, limits or priorities. Its
only filter of system calls is the cell's, against io_uring. `python -m hack.trial_dump` makes it anew.
"""

import base64
import json
import os
import struct
import zlib
from pathlib import Path

from rekindle.criu.protobuf import Field, encode_fields, read_fields

PID = 1001
PLACE = "dev/shm/trial"
"""The program in a cell."""

_CODE = bytes.fromhex(
    "488b1c24 488d54dc10"  # mov rbx, [rsp]; lea rdx, [rsp + rbx * 8 + 16]: behind the arguments
    "4883c208 48837af800 75f5"  # add rdx, 8; cmp qword [rdx - 8], 0; jne: behind the environment
    "48833a21 7406 4883c210 ebf4"  # cmp qword [rdx], 33; je; add rdx, 16; jmp: at the vDSO's entry
    "488b7a08 4881ef00600000 be00800000 b80b000000 0f05"  # munmap([rdx + 8] - 0x6000, 0x8000)
    "b822000000 0f05 ebf7"  # pause(), again
)
_ADDRESS, _HEADERS_BYTES = 0x400000, 64 + 56
_THREAD, _CREDENTIALS = 5, 10  # CRIU's images/core.proto
_SETS = {10: "CapPrm", 11: "CapEff", 12: "CapBnd"}  # images/creds.proto

_FILES = (
    "c-rlm&u<$=6vzLS%@QD#CZ6%nO^}L9MC&3{1r&l0TZq?QXH#M)a@;5cp*RXc6%nY%9wSav9LNEoR6@n-iQanPfT~L58dazlkfRnb"
    "_P$wrHr{P^owy?C>%(VuX5V}BW_IT7?DHpTez9VXa>n@Bd}&UdP*nX|t1>=0GksBOU$Vq|c41P*CKEL5lG_^5f9y(BG%{+;xvEUM"
    "CgV(@VuT73;M(VQ8BbGdhKeaFvbs9^!$ysIv+56<t)FeNxKtCZtF^tqe{x!D!b$ZyU3~B8-k^HyCY7SkZK`cccE6#fS9iL@Wo%cj"
    ")aA<0a^=2U`Bkp$NfnyH+%KYH*d4QEm`P(=?e#Qy%wieW#Qpz@DHNx=&?(BqThXByZjsXtaRmn6YqT;5qn#*tGKTFPe@kq1Ig+}p"
    "*D20K6%n*V2T_W~)yjNsVZxR)^>WKfuxLxMIh=Sdu=u-FSWW<C#WmZv5bpsfKmiI+fC3bt00k&O0Sf<7g&T5K;|(g#T<NvJwF%eP"
    "j-UDHTjDz+)lc$Bd~~t2XWpRoNz$Nik|~iY$#$EvqG`6<G%K1c(!VJW)m6!o>$B8$Rr)+z3p8j}lhZ-!Sw$_*FPO_cNjZ(PnTRV1"
    "*PDuCa!%<L|8Gn2sKP#P`t~#<1#=~`Y?UJRDAOVzHud|a$OGD`vp}9k#RsN6MsYuS!tU~j;~5X(S<J(;*x)>~AN#U*HkQ8G$J6gn"
    "n$p*OdE#PigYyL+i%glEmYqAoSXADkikyvb1n6Fjc3zyeT$0iqsjP0$-bmO!l~>Gib+PiX%c&&i*~@`^;nH)_eAm86zmTuIA78yx"
    "ovkh&_0{1*N-Gu&BR*<Gqsh@YPbEhU&5Vz7%`D_uEXVRjvOVZh$@@7dBbVMEkz<K7?3$C$rjhM#$W^U#SLxgsk+asUwk?{q&Q<!s"
    "Z(V`RzEqi#D_OZBLYg&X)wY|RthyDmcCJ|DnAL22_m_~OiL`18-Q!ll5)riS_)86OOQVZ~C99@Hq_uRTb5*qt+`8Rc#m-fwb7e;-"
    "xyDnj+PHOF8XmRfEXjVWasRLcD_Zw@w8#&hcM7HAtjI%;uJZtTgMnCF31?lNPrK5D6_MOCYV}5^cVTp|>2C1~GBNhGFuWoEr@|{Q"
    "*iJrecCvK5<7!W%m*F_mRqZpE%~dL{%WJv4@RxFPW+}Jiz4~8F>&8rXa{NOwGraB}nrPY4xV))MPv!cd8Fc9<N4inDJ%m;mb-Z7H"
    "^X&_g&)j48hNBq!IjPCR+^Xwn<Hz(d{OFTu*U_u5+3=H348+qD5Zw)KX}2F=c_7Km7R8?7%$L&-NiDN^S2r@7YX>B8?a$2S#88!%"
    "bo-ty^yrVw)>=z!<1tCi%0}<VM^e`q3?Dz}IF;C?zf1fD9yOl-;siku1VIo4K@bE%5ClOG1VIo4K@bE%5ClOG1VIo4K@bE%5ClOG"
    "1VIo4K@bE%5ClOG1VIo4K@bE%5ClOG1VIo4K@bE%5ClOG1VIo4K@bE%5ClOG1VIo4K@bE%5ClOG1VIo4K@bE%5ClOG1VIo4K@bE%"
    "5ClOG1VIo4K@bGNQ$ikG{=wsBv$_5}Jsb+FaKG7bdl(C@yE7J4mWS}D`E<)xDLzvy+0Xn0cY}v`%7u`wgqY#9t9T~k!L4c`9Zn2x"
    "huBOFa90=uv|SA@yBhpK4$|Y|0Bu(W9NWyn+UKbO+aC`uf7|oD!E+(|jfV6v#Om1hezS$JaL;>;Ay+@o4^Cb=?Z=fy<J%w4eD%R="
    "7w>*?Sy!)qq#LVR^222O_?9CDb0xBDl_J&3d~U(NEiBcuin_F1t(fN6d}&UdP*mDFlQYwdy*%X`2aNshi$s3Ob4}b(L^&eLc1O!*"
    "KEGI6>gnkcJ6|Y!bW$GH%Sy;a!F%7G{Fcv4(&I?;lFwWCh|>@4E3S!-$`|x<S_yY<@NhhSPHw6nXC}lE=#KYHxI{$|I|yJ^7<$s*"
    "kx>MrBc$r<y=#m*S3mt1FBBR~"
)


def program() -> bytes:
    """Return the program, an ELF executable."""
    size = _HEADERS_BYTES + len(_CODE)
    header = b"\x7fELF\2\1\1".ljust(16, b"\0") + struct.pack(
        "<HHIQQQIHHHHHH",
        *(2, 62, 1, _ADDRESS + _HEADERS_BYTES),  # ET_EXEC, EM_X86_64, version 1, entry
        *(64, 0, 0),
        *(64, 56, 1, 0, 0, 0),
    )
    load, read_execute = 1, 5
    segment = struct.pack("<IIQQQQQQ", load, read_execute, 0, _ADDRESS, _ADDRESS, size, size, 4096)
    return header + segment + _CODE


def available() -> bool:
    """Tell whether there is a dump for this architecture."""
    return os.uname().machine == "x86_64"


def write(directory: Path, capabilities: dict[str, int]) -> None:
    """Write CRIU's images of a process that has these capabilities: `CapPrm`, `CapEff` and `CapBnd`."""
    for name, content in json.loads(zlib.decompress(base64.b85decode(_FILES)).decode("latin-1")).items():
        (directory / name).write_bytes(content.encode("latin-1"))
    core = directory / f"core-{PID}.img"
    magics, message = core.read_bytes()[:8], core.read_bytes()[12:]  # and the length of the message
    message = _with_capabilities(message, core, capabilities)
    core.write_bytes(magics + struct.pack("<I", len(message)) + message)


def pack(directory: Path) -> str:
    """Return the text of a dump's files, for `write`."""
    files = {path.name: path.read_bytes().decode("latin-1") for path in sorted(directory.glob("*.img"))}
    return base64.b85encode(
        zlib.compress(json.dumps(files, ensure_ascii=False).encode("latin-1"), 9)
    ).decode()


def _with_capabilities(message: bytes, path: Path, capabilities: dict[str, int]) -> bytes:
    def within(fields: list[Field], number: int, fields_of: list[Field]) -> list[Field]:
        return [(n, w, encode_fields(fields_of)) if n == number else (n, w, v) for n, w, v in fields]

    core = read_fields(message, path)
    thread = _message(core, _THREAD, path)
    credentials = [each for each in _message(thread, _CREDENTIALS, path) if each[0] not in _SETS]
    for number, name in _SETS.items():
        mask = capabilities[name]
        credentials += [(number, 0, mask & 0xFFFFFFFF), (number, 0, mask >> 32)]
    credentials.sort(key=lambda field: field[0])
    return encode_fields(within(core, _THREAD, within(thread, _CREDENTIALS, credentials)))


def _message(fields: list[Field], number: int, path: Path) -> list[Field]:
    value = next(value for each, _, value in fields if each == number)
    assert isinstance(value, bytes)
    return read_fields(value, path)
