"""What kind of file a library is, told from its bytes, before the system's loader sees it.

The loader's own words name neither the file's format nor its machine, and a library whose end is missing ends the
process: the pages behind a file's end are mapped, and touching them is a bus error. So a file is looked at first. What
is expected here is what the running program itself is.

Source:
    ELF: gABI 4.1, ``Elf32_Ehdr`` to ``Elf64_Sym``; Mach-O: ``mach-o/loader.h``; PE: Microsoft's PE format.
"""

from __future__ import annotations

import os
import struct
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from rpcnb.errors import LibraryError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Kind", "check_library", "check_object", "identify", "undefined_symbols"]

_PROGRAMS = ("/proc/self/exe", sys.executable)  # what runs here; the first that can be read
_SYMBOLS = 2  # SHT_SYMTAB
_HEAD = 4096  # bytes in which every format says what it is

_ELF_MACHINES = {
    2: "SPARC",
    3: "x86",
    8: "MIPS",
    20: "PowerPC",
    21: "PowerPC64",
    22: "s390",
    40: "ARM",
    43: "SPARC64",
    62: "x86-64",
    164: "Hexagon",
    183: "AArch64",
    243: "RISC-V",
    247: "BPF",
    258: "LoongArch",
}
_ELF_TYPES = {1: "object file", 2: "program", 3: "shared library", 4: "core dump"}
_MACH_MACHINES = {7: "x86", 12: "ARM", 0x01000007: "x86-64", 0x0100000C: "AArch64"}
_MACH_TYPES = {1: "object file", 2: "program", 6: "shared library", 8: "shared library"}
_PE_MACHINES = {0x14C: "x86", 0x1C4: "ARM", 0x8664: "x86-64", 0xAA64: "AArch64"}
_STARTS = (
    (b"\0asm", "WebAssembly"),
    (b"!<arch>\n", "archive (ar)"),
    (b"\x1f\x8b", "gzip"),
    (b"PK\x03\x04", "zip"),
    (b"BC\xc0\xde", "LLVM bitcode"),
)


class Kind(NamedTuple):
    """What a file is.

    Attributes:
        format: ``ELF``, ``Mach-O``, ``PE``, ``WebAssembly``, ``text``...; empty for bytes of no known kind.
        what: ``shared library``, ``object file``, ``program``...; empty where the format has no such difference.
        machine: What it was compiled for, where the format says so.
        bits: 32 or 64, likewise.
    """

    format: str
    what: str = ""
    machine: str = ""
    bits: int = 0

    def __str__(self) -> str:
        words = " ".join(word for word in (self.format, self.what or "file") if word)
        machine = f" for {self.machine}" if self.machine else ""
        article = "an" if words[0] in "ELae" else "a"
        return f"{article} {words}{machine}{f' ({self.bits} bits)' if self.bits else ''}"


def identify(head: bytes) -> Kind:
    """Tell what a file is from its first bytes, 4096 if it has as many."""
    if head.startswith(b"\x7fELF"):
        return _identify_elf(head)
    if head[:4] in (b"\xfe\xed\xfa\xce", b"\xfe\xed\xfa\xcf", b"\xce\xfa\xed\xfe", b"\xcf\xfa\xed\xfe"):
        return _identify_mach(head)
    if head.startswith(b"\xca\xfe\xba\xbe") and 0 < int.from_bytes(head[4:8], "big") < 32:  # else a class of Java
        return Kind("Mach-O", "file", "several machines")
    if head.startswith(b"MZ"):
        return _identify_pe(head)
    for start, name in _STARTS:
        if head.startswith(start):
            return Kind(name)
    if head[257:262] == b"ustar":
        return Kind("archive (tar)")
    if not head:
        return Kind("empty")
    return Kind("text") if _is_text(head) else Kind("", f"file that begins with {head[:4].hex(' ')}")


def _is_text(head: bytes) -> bool:
    text = head.decode("utf-8", "replace").rstrip("\ufffd")  # the head may end inside a letter
    return "\ufffd" not in text and all(letter.isprintable() or letter.isspace() for letter in text)


def _identify_elf(head: bytes) -> Kind:
    if len(head) < 20:
        return Kind("ELF")
    what, machine = struct.unpack_from(_order(head) + "HH", head, 16)
    name = _ELF_MACHINES.get(machine, f"machine {machine}")
    return Kind("ELF", _ELF_TYPES.get(what, "file"), name, 64 if head[4] == 2 else 32)


def _order(head: bytes) -> str:
    """Return how numbers of an ELF file are written, as ``struct`` says it."""
    return ">" if head[5] == 2 else "<"


def _identify_mach(head: bytes) -> Kind:
    order = ">" if head[0] == 0xFE else "<"
    if len(head) < 16:
        return Kind("Mach-O")
    magic, machine, _, what = struct.unpack_from(order + "IIII", head)
    name = _MACH_MACHINES.get(machine, f"machine {machine:#x}")
    return Kind("Mach-O", _MACH_TYPES.get(what, "file"), name, 64 if magic & 1 else 32)


def _identify_pe(head: bytes) -> Kind:
    at = int.from_bytes(head[0x3C:0x40], "little")
    if len(head) < at + 24 or head[at : at + 4] != b"PE\0\0":
        return Kind("DOS", "program")
    machine, flags = struct.unpack_from("<H16xH", head, at + 4)
    name = _PE_MACHINES.get(machine, f"machine {machine:#x}")
    return Kind("PE", "shared library" if flags & 0x2000 else "program", name)


@cache
def here() -> Kind:
    """Return what a shared library is here: what the running program is."""
    for path in _PROGRAMS:
        try:
            with open(path, "rb") as file:
                found = identify(file.read(_HEAD))
        except OSError:
            continue
        if found.format in ("ELF", "Mach-O", "PE"):
            return found._replace(what="shared library")
    return Kind("")  # nothing is expected, and the loader has the only word


def check_library(path: Path, name: str = "") -> None:
    """Refuse a file that the system's loader cannot take, or must not.

    Args:
        path: The file.
        name: What users call it, if not as the path does.

    Raises:
        LibraryError: It is something else than a shared library for this machine, or its end is missing.
    """
    _check(path, "shared library", f"cannot load {name or path.name}: it is")


def check_object(path: Path, archive: str = "") -> None:
    """Refuse a file that is compiled, but not an object file for this machine; the compiler judges all others.

    Args:
        path: The file.
        archive: Name of the archive that it was in.

    Raises:
        LibraryError: It is for another machine, or of another kind.
    """
    with open(path, "rb") as file:
        head = file.read(_HEAD)
    kind = identify(head).format
    verb = "holds" if archive else "is"
    if not head or kind == "archive (ar)":  # a linker takes both, and nothing of them
        what = "a static archive (ar), of which nothing would be linked; send its object files, in a tar"
        raise LibraryError(f"cannot link {archive or path.name}: it {verb} {what if head else 'an empty file'}")
    if kind in ("ELF", "Mach-O", "PE", "WebAssembly"):
        _check(path, "object file", f"cannot link {archive or path.name}: it {verb}")


def undefined_symbols(path: Path) -> frozenset[bytes] | None:
    """Return the symbols that an object file leaves to others; None if it is no ELF file, or does not say it plainly.

    Args:
        path: A file that :func:`check_object` has passed: its tables lie within it.
    """
    data = path.read_bytes()
    if len(data) < 52 or not data.startswith(b"\x7fELF") or b".gnu.lto_" in data:  # what that needs a compiler knows
        return None
    order, wide = _order(data), data[4] == 2
    (at,) = struct.unpack_from(order + ("Q" if wide else "I"), data, 40 if wide else 32)
    each, count = struct.unpack_from(order + "HH", data, 58 if wide else 46)
    form = order + ("4xI16xQQI" if wide else "4xI8xIII")  # type, offset, size, link
    if each < struct.calcsize(form):
        return None
    sections = [struct.unpack_from(form, data, at + number * each) for number in range(count)]
    tables = [section for section in sections if section[0] == _SYMBOLS]
    if len(tables) != 1 or tables[0][3] >= count:
        return None
    _, first, nbytes, link = tables[0]
    names = sections[link][1]
    symbol = struct.Struct(order + ("I2xH16x" if wide else "I10xH"))  # name, section
    found = set()
    for name, section in symbol.iter_unpack(data[first : first + nbytes - nbytes % symbol.size]):
        if section == 0 and name:
            found.add(data[names + name : data.find(b"\0", names + name)])
    return frozenset(found)


def _check(path: Path, what: str, says: str) -> None:
    with open(path, "rb") as file:
        head = file.read(_HEAD)
        found, expected = identify(head), here()._replace(what=what)
        cut = _find_cut(file, head, os.fstat(file.fileno()).st_size) if found.format == "ELF" else ""
    if cut:
        raise LibraryError(f"{says} {found} whose end is missing: {cut}; upload it again")
    if not expected.format or found == expected or (found.format == expected.format == "Mach-O"):
        return  # a Mach-O file may be for several machines
    raise LibraryError(f"{says} {found}; expected {expected} here")


def _find_cut(file: BinaryIO, head: bytes, size: int) -> str:
    """Say what of an ELF file lies behind its end; empty if it is whole."""
    wide = len(head) > 4 and head[4] == 2
    nbytes = 64 if wide else 52
    if len(head) < nbytes:
        return f"its header takes {nbytes} bytes and the file has {size}"
    for name, end in _ends(file, head, wide, size):
        if end > size:
            return f"{name} at byte {end} and the file has {size}"
    return ""


def _ends(file: BinaryIO, head: bytes, wide: bool, size: int) -> Iterator[tuple[str, int]]:
    """Yield where the tables of an ELF file, its segments and its sections end; a table is read if it is there."""
    order = _order(head)
    segments, sections = struct.unpack_from(order + ("QQ" if wide else "II"), head, 32 if wide else 28)
    counts = struct.unpack_from(order + "HHHH", head, 54 if wide else 42)
    yield "its segments' table ends", segments + counts[0] * counts[1]
    yield "its sections' table ends", sections + counts[2] * counts[3]
    # Where offset and size stand in an entry, and how long that is.
    segment = ("8xQ16xQ16x" if wide else "4xI8xI12x", 56 if wide else 32)
    section = ("4xI16xQQ24x" if wide else "4xI8xII16x", 64 if wide else 40)
    for offset, nbytes in _entries(file, segments, counts[0], counts[1], order + segment[0], segment[1]):
        yield "a segment ends", offset + nbytes
    for kind, offset, nbytes in _entries(file, sections, counts[2], counts[3], order + section[0], section[1]):
        if kind not in (0, 8):  # SHT_NULL is none, SHT_NOBITS takes no room in the file
            yield "a section ends", offset + nbytes


def _entries(file: BinaryIO, at: int, each: int, count: int, form: str, least: int) -> Iterator[tuple[int, ...]]:
    if each < least:
        return
    file.seek(at)
    data = file.read(each * count)
    for start in range(0, len(data), each):
        yield struct.unpack_from(form, data, start)
