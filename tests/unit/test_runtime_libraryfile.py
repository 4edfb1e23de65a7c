"""What a library's bytes say it is, and what is missing of it; the files are made by hand."""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rpcnb.errors import LibraryError
from rpcnb.runtime import libraryfile
from rpcnb.runtime.libraryfile import Kind, check_library, check_object, here, identify, undefined_symbols

HERE = Kind("ELF", "shared library", "x86-64", 64)


def elf(what: int = 3, machine: int = 62, bits: int = 64, order: str = "<") -> bytes:
    """An ELF file with a segment, and three sections: none, one with bytes, and one that takes no room."""
    word = "Q" if bits == 64 else "I"
    nbytes, segment, section = (64, 56, 64) if bits == 64 else (52, 32, 40)
    at = nbytes + segment + 16  # of the sections' table; 16 bytes of data before it
    head = b"\x7fELF" + bytes([bits // 32, 1 if order == "<" else 2, 1]).ljust(12, b"\0")
    head += struct.pack(
        f"{order}HHI3{word}IHHHHHH", what, machine, 1, 0, nbytes, at, 0, nbytes, segment, 1, section, 3, 0
    )
    assert len(head) == nbytes
    data = nbytes + segment
    if bits == 64:
        program = struct.pack(order + "IIQQQQQQ", 1, 5, data, 0, 0, 16, 4096, 4096)
        table = [struct.pack(order + "IIQQQQIIQQ", 0, kind, 0, 0, *where, 0, 0, 1, 0) for kind, where in sections(data)]
    else:
        program = struct.pack(order + "IIIIIIII", 1, data, 0, 0, 16, 4096, 5, 4096)
        table = [struct.pack(order + "IIIIIIIIII", 0, kind, 0, 0, *where, 0, 0, 1, 0) for kind, where in sections(data)]
    return head + program + bytes(16) + b"".join(table)


def sections(data: int) -> list[tuple[int, tuple[int, int]]]:
    return [(0, (0, 1 << 20)), (1, (data, 16)), (8, (data, 1 << 20))]


def mach(what: int, machine: int = 0x0100000C, order: str = "<", magic: int = 0xFEEDFACF) -> bytes:
    return struct.pack(order + "IIII", magic, machine, 0, what) + bytes(16)


def pe(flags: int = 0x2000, machine: int = 0x8664) -> bytes:
    return b"MZ".ljust(0x3C, b"\0") + struct.pack("<I4sHHIIIHH", 0x40, b"PE\0\0", machine, 1, 0, 0, 0, 0, flags)


KINDS = [
    (elf(), "an ELF shared library for x86-64 (64 bits)"),
    (elf(1, 183), "an ELF object file for AArch64 (64 bits)"),
    (elf(2, 40, 32), "an ELF program for ARM (32 bits)"),
    (elf(3, 8, 32, ">"), "an ELF shared library for MIPS (32 bits)"),
    (elf(9, 9999), "an ELF file for machine 9999 (64 bits)"),
    (elf()[:12], "an ELF file"),
    (mach(6), "a Mach-O shared library for AArch64 (64 bits)"),
    (mach(1, 7, ">", 0xFEEDFACE), "a Mach-O object file for x86 (32 bits)"),
    (mach(99, 99), "a Mach-O file for machine 0x63 (64 bits)"),
    (mach(6)[:8], "a Mach-O file"),
    (bytes.fromhex("cafebabe 00000002") + bytes(40), "a Mach-O file for several machines"),
    (bytes.fromhex("cafebabe 00000041") + bytes(40), "a file that begins with ca fe ba be"),
    (pe(), "a PE shared library for x86-64"),
    (pe(0, 0xAA64), "a PE program for AArch64"),
    (pe(0, 1), "a PE program for machine 0x1"),
    (b"MZ" + bytes(100), "a DOS program"),
    (b"\0asm\1\0\0\0", "a WebAssembly file"),
    (b"!<arch>\nx", "an archive (ar) file"),
    (b"x.o".ljust(257, b"\0") + b"ustar\0", "an archive (tar) file"),
    (b"\x1f\x8b\x08", "a gzip file"),
    (b"PK\x03\x04", "a zip file"),
    (b"BC\xc0\xde", "an LLVM bitcode file"),
    (b"", "an empty file"),
    (b"int main() {\n\treturn 0;\n}\n", "a text file"),
    ("ä".encode() * 2048 + b"\xc3", "a text file"),
    (b"a\0b", "a file that begins with 61 00 62"),
    (b"\xff\xfea", "a file that begins with ff fe 61"),
]


@pytest.mark.parametrize(("data", "words"), KINDS, ids=[words for _, words in KINDS])
def test_a_file_says_what_it_is(data: bytes, words: str) -> None:
    assert str(identify(data)) == words


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine loads 64-bit ELF libraries for x86-64."""
    monkeypatch.setattr(libraryfile, "here", lambda: HERE)


def file(folder: Path, data: bytes, name: str = "m.so") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def object_file(bits: int = 64, order: str = "<", tables: int = 1, link: int = 2) -> bytes:
    """An object file that defines ``main`` and leaves ``TVMOne`` and ``two`` to others."""
    names = b"\0main\0TVMOne\0two\0"
    symbols = [(0, 0), (1, 1), (6, 0), (13, 0)]  # name, section
    wide = bits == 64
    word, nbytes, each = ("Q", 64, 64) if wide else ("I", 52, 40)
    if wide:
        table = b"".join(struct.pack(order + "IBBHQQ", name, 0, 0, section, 0, 0) for name, section in symbols)
    else:
        table = b"".join(struct.pack(order + "IIIBBH", name, 0, 0, 0, 0, section) for name, section in symbols)
    parts = [(0, 0, 0, 0)] + tables * [(2, nbytes + len(names), len(table), link)] + [(3, nbytes, len(names), 0)]
    at = nbytes + len(names) + len(table)
    head = b"\x7fELF" + bytes([bits // 32, 1 if order == "<" else 2, 1]).ljust(12, b"\0")
    head += struct.pack(f"{order}HHI3{word}IHHHHHH", 1, 62, 1, 0, 0, at, 0, nbytes, 0, 0, each, len(parts), 0)
    form = order + ("IIQQQQIIQQ" if wide else "IIIIIIIIII")
    return head + names + table + b"".join(struct.pack(form, 0, part[0], 0, 0, *part[1:], 0, 1, 0) for part in parts)


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("order", ["<", ">"])
def test_an_object_file_says_what_it_leaves_to_others(tmp_path: Path, bits: int, order: str) -> None:
    assert undefined_symbols(file(tmp_path, object_file(bits, order))) == frozenset({b"TVMOne", b"two"})


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"text" * 20,
        mach(1) + bytes(40),
        object_file(tables=0),
        object_file(tables=2),
        object_file(link=3),
        object_file()[:58] + b"\1\0\xff\xff" + object_file()[62:],
    ],
)
def test_what_does_not_say_it_plainly_says_nothing(tmp_path: Path, data: bytes) -> None:
    assert undefined_symbols(file(tmp_path, data)) is None


@pytest.mark.usefixtures("board")
@pytest.mark.parametrize("data", [elf(), elf() + b"more"])
def test_a_whole_library_for_this_machine_passes(tmp_path: Path, data: bytes) -> None:
    check_library(file(tmp_path, data))


@pytest.mark.usefixtures("board")
@pytest.mark.parametrize("data", [elf(3, 183), elf(1), elf(3, 62, 32), mach(6), pe(), b"text", b"\0asm"])
def test_anything_else_is_refused_with_what_it_is_and_what_is_expected(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(LibraryError) as info:
        check_library(file(tmp_path, data))
    assert str(info.value) == f"cannot load m.so: it is {identify(data)}; expected {HERE} here"
    with pytest.raises(LibraryError, match=r"^cannot load theirs\.so: it is"):
        check_library(file(tmp_path, data), "theirs.so")


@pytest.mark.parametrize(("bits", "order"), [(64, "<"), (64, ">"), (32, "<"), (32, ">")])
def test_no_cut_of_a_library_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int, order: str) -> None:
    data = elf(3, 62, bits, order)
    monkeypatch.setattr(libraryfile, "here", lambda: HERE._replace(bits=bits))
    check_library(file(tmp_path, data))
    for size in range(4, len(data)):
        with pytest.raises(LibraryError, match=rf"whose end is missing: .* the file has {size}; upload it again"):
            check_library(file(tmp_path, data[:size]))


@pytest.mark.usefixtures("board")
@pytest.mark.parametrize(
    ("at", "value", "text"),
    [
        (32, 1 << 40, "its segments' table ends at byte 1099511627832"),
        (40, 1 << 40, "its sections' table ends at byte 1099511627968"),
        (64 + 8, 1 << 40, "a segment ends at byte 1099511627792"),
        (64 + 56 + 16 + 64 + 32, 1 << 40, "a section ends at byte 1099511627896"),
    ],
)
def test_what_lies_behind_the_end_is_named(tmp_path: Path, at: int, value: int, text: str) -> None:
    data = bytearray(elf())
    struct.pack_into("<Q", data, at, value)
    with pytest.raises(LibraryError, match=f"whose end is missing: {text} and the file has {len(data)}"):
        check_library(file(tmp_path, bytes(data)))


@pytest.mark.usefixtures("board")
def test_entries_that_are_too_short_are_left_to_the_loader(tmp_path: Path) -> None:
    data = bytearray(elf())
    struct.pack_into("<H", data, 54, 8)
    check_library(file(tmp_path, bytes(data)))


@pytest.mark.usefixtures("board")
def test_object_files_for_other_machines_are_refused_and_the_compiler_judges_the_rest(tmp_path: Path) -> None:
    for data in (elf(1), b"int x;"):
        check_object(file(tmp_path, data, "m.o"))
    expected = "expected an ELF object file for x86-64 \\(64 bits\\) here"
    with pytest.raises(LibraryError, match=rf"^cannot link m\.o: it is an ELF object file for AArch64 .*; {expected}$"):
        check_object(file(tmp_path, elf(1, 183), "m.o"))
    with pytest.raises(LibraryError, match=rf"^cannot link m\.tar: it holds a WebAssembly file; {expected}$"):
        check_object(file(tmp_path, b"\0asm", "0.o"), "m.tar")
    with pytest.raises(LibraryError, match=r"^cannot link m\.o: it is an empty file$"):
        check_object(file(tmp_path, b"", "m.o"))
    with pytest.raises(LibraryError, match=r"^cannot link m\.tar: it holds a static archive \(ar\), of which nothing"):
        check_object(file(tmp_path, b"!<arch>\n", "0.o"), "m.tar")


def test_a_universal_file_is_left_to_a_mac_and_everything_where_nothing_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libraryfile, "here", lambda: Kind("Mach-O", "shared library", "AArch64", 64))
    check_library(file(tmp_path, bytes.fromhex("cafebabe 00000002") + bytes(40)))
    monkeypatch.setattr(libraryfile, "here", lambda: Kind(""))
    check_library(file(tmp_path, b"text"))


@pytest.fixture
def _fresh() -> Iterator[None]:
    here.cache_clear()
    yield
    here.cache_clear()


@pytest.mark.usefixtures("_fresh")
def test_what_is_expected_is_what_the_running_program_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, script = file(tmp_path, pe(0), "python.exe"), file(tmp_path, b"#!/bin/sh", "python")
    for programs, expected in (
        (("nowhere", str(program)), Kind("PE", "shared library", "x86-64")),
        ((str(script), "nowhere"), Kind("")),
    ):
        monkeypatch.setattr(libraryfile, "_PROGRAMS", programs)
        here.cache_clear()
        assert here() == expected
    monkeypatch.undo()
    here.cache_clear()
    assert sys.executable in libraryfile._PROGRAMS
    assert here().what == "shared library"
