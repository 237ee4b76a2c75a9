"""Bytes of a file -> text as it is read on, whatever a spreadsheet or an export made of them.

UTF-8 with or without a byte order mark, UTF-16 and UTF-32 with one or recognised by their zero bytes, and any
of these compressed by gzip, bzip2 or xz, or alone in a ZIP archive. What is something else by its first bytes
is named as what it is; what is left is
not guessed, since a guess between two encodings of one byte a letter is wrong as often as right.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import shlex
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from fedtune.errors import DataError

__all__ = [
    "ENDINGS",
    "bare_name",
    "is_workbook",
    "kind_of",
    "open_bytes",
    "open_text",
    "read_text",
    "text_of",
]

_ZIP = b"PK\x03\x04"
_WORKBOOK = b"xl/workbook"
ENDINGS = (".gz", ".bz2", ".xz", ".zip")  # of a compressed file, after that of what is in it
_SAVE = "Open it where it was made, and save it as CSV UTF-8."
_UNPACK = "Unpack it first."
_WRITE = "Write its table as CSV or Parquet."
_KINDS = (  # place, bytes there, what it is, the way out
    (
        0,
        b"version https://git-lfs",
        "a Git LFS pointer in place of the file",
        "Run `git lfs pull` in its folder.",
    ),
    (30, b"mimetypeapplication/vnd.oasis", "a spreadsheet or document of OpenDocument (.ods)", _SAVE),
    (30, b"[Content_Types].xml", "a document of Office (.docx)", _SAVE),
    (0, _ZIP, "a ZIP archive of several files", "Unpack it, and name its folder."),
    (0, b"PK\x05\x06", "a ZIP archive with nothing in it", "Make it again."),
    (257, b"ustar", "a tar archive", "Unpack it (tar -xf), and name its folder."),
    (0, b"\xd0\xcf\x11\xe0", "a workbook or document of old Office (.xls)", _SAVE),
    (0, b"PAR1", "a Parquet file", "Let its name end in .parquet."),
    (0, b"ARROW1", "an Arrow file", "Write it as Parquet."),
    (0, b"\x28\xb5\x2f\xfd", "compressed by Zstandard", _UNPACK),
    (0, b"\x1f\x8b", "compressed by gzip twice", _UNPACK),
    (0, b"7z\xbc\xaf", "a 7z archive", _UNPACK),
    (0, b"%PDF", "a PDF document", "Copy its texts into a CSV file."),
    (0, b"{\\rtf", "a rich text document", _SAVE),
    (0, b"SQLite format 3", "an SQLite database", _WRITE),
    (0, b"\x89HDF", "an HDF5 file", _WRITE),
    (0, b"\x80\x04\x95", "a pickle of Python's", _WRITE),
    (0, b"\x80\x05\x95", "a pickle of Python's", _WRITE),
    (0, b"<?xml", "XML", _SAVE),
)
_MARKS = (  # the longer first: UTF-32's begins as UTF-16's does
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8-sig"),
)
_PAGE = ("<!doctype html", "<html", "<table", "<!--")
_CONTROL = bytes(
    sorted({*range(9), *range(14, 26), *range(28, 32)})
)  # that no text has, but for ^Z at an end
_LOOKED_AT = 4096  # bytes, for an encoding without a mark
_CHUNK = 1 << 16  # bytes that are read at once


def bare_name(path: Path) -> Path:
    """The name of a file without the ending of its compression."""
    return path.with_suffix("") if path.suffix.lower() in ENDINGS else path


@contextmanager
def open_bytes(path: Path) -> Iterator[io.BufferedReader[Any]]:
    """The content of a file, unpacked where it is compressed; of a ZIP archive that of its only file.

    Raises:
        DataError: its compression is damaged or cut off; wherever that is met in reading.
        OSError: it cannot be read.
    """
    with ExitStack() as opened:
        raw: io.RawIOBase = opened.enter_context(path.open("rb", buffering=0))
        file: io.BufferedReader[Any] = opened.enter_context(io.BufferedReader(raw, _CHUNK))
        head = file.peek(len(_ZIP))
        unpack = next((how for mark, how in _UNPACKED.items() if head.startswith(mark)), None)
        if unpack is not None:
            with _damage_named(path, unpack[0]):
                inner = unpack[1](file)
            if inner is None:
                file.seek(0)
            else:
                file = opened.enter_context(io.BufferedReader(_Unpacked(path, unpack[0], inner), _CHUNK))
        yield file


class _Unpacked(io.RawIOBase):
    """What is in a compressed file, as it is read on."""

    def __init__(self, path: Path, how: str, inner: IO[bytes]) -> None:
        self.path, self.how, self.inner = path, how, inner

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with _damage_named(self.path, self.how):
            content = self.inner.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)


_DAMAGED = (zlib.error, lzma.LZMAError, zipfile.BadZipFile)


@contextmanager
def _damage_named(path: Path, how: str) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, ValueError, RuntimeError, NotImplementedError, *_DAMAGED) as error:
        raise DataError(
            f"{path} is compressed by {how}, and damaged or cut off ({str(error).rstrip('.')}). Copy it "
            "again."
        ) from error


def _only_file(file: io.BufferedReader[Any]) -> IO[bytes] | None:
    """The only file of a ZIP archive; None if it has several, is locked by a password, or is a workbook."""
    if _of_workbook(file):
        return None
    archive = zipfile.ZipFile(file)
    # Macs add a folder of their own.
    files = [
        one for one in archive.infolist() if not one.is_dir() and not one.filename.startswith("__MACOSX")
    ]
    return archive.open(files[0]) if len(files) == 1 and not files[0].flag_bits & 1 else None


_UNPACKED: dict[bytes, tuple[str, Callable[[Any], Any]]] = {
    b"\x1f\x8b": ("gzip", lambda file: gzip.GzipFile(fileobj=file)),
    b"BZh": ("bzip2", bz2.BZ2File),
    b"\xfd7zXZ": ("xz", lzma.LZMAFile),
    _ZIP: ("ZIP", _only_file),
}


def is_workbook(path: Path) -> bool:
    """Is this a workbook of Excel (.xlsx)? Raises as `open_bytes`."""
    with open_bytes(path) as file:
        return file.peek(len(_ZIP)).startswith(_ZIP) and _of_workbook(file)


def _of_workbook(file: io.BufferedReader[Any]) -> bool:
    """Does an archive name what a workbook has? Reads it to where that stands, mostly its end."""
    before = b""
    while chunk := file.read(_CHUNK):
        if _WORKBOOK in before + chunk:
            return True
        before = chunk[-len(_WORKBOOK) :]
    return False


def kind_of(path: Path) -> str | None:
    """What a file is by its content, and what to do with it; None of one that may be text."""
    try:
        with path.open("rb") as file:
            head = file.read(_LOOKED_AT)
    except OSError:
        return None
    for mark, (how, _) in _UNPACKED.items():
        office = any(place == 30 and head.startswith(inner, place) for place, inner, _, _ in _KINDS)
        if head.startswith(mark) and not office:
            ending = next((one for one in ENDINGS if path.name.endswith(one)), path.suffix)
            return f"compressed by {how}. Let its name say what is in it, such as train.csv{ending}."
    for place, mark, what, way in _KINDS:
        if head.startswith(mark, place):
            return f"{what}. {way}"
    return None


@contextmanager
def open_text(path: Path, newline: str = "") -> Iterator[io.TextIOWrapper]:
    """The text of a file, without a byte order mark; line ends as they are.

    Args:
        newline: which ends a line is read to, as of `open`: empty, any of the three.

    Raises:
        DataError: it is no text, or in an encoding that cannot be told; wherever that is met in reading.
        OSError: it cannot be read.
    """
    with open_bytes(path) as file:
        head = file.peek(_LOOKED_AT)
        if head.startswith(_ZIP) and is_workbook(path):
            raise DataError(f"{path} is a workbook of Excel (.xlsx) by its content. {_SAVE}")
        for place, mark, what, way in _KINDS:
            if head.startswith(mark, place):
                raise DataError(f"{path} is {what}, by its content. {way}")
        encoding = next((name for mark, name in _MARKS if head.startswith(mark)), None) or _unmarked(head)
        if head.decode(encoding, "ignore")[:200].lstrip().lower().startswith(_PAGE):
            raise DataError(
                f"{path} is a web page (HTML), as of a download that needs a login. Download it again."
            )
        try:
            yield io.TextIOWrapper(file, encoding, newline=newline)
        except UnicodeDecodeError as error:
            raise _no_text(
                path, encoding.removesuffix("-sig"), binary=len(head.translate(None, _CONTROL)) < len(head)
            ) from error


def read_text(path: Path) -> str:
    """The whole text of a file. Raises as `open_text`."""
    with open_text(path) as text:
        return text.read()


def text_of(content: bytes) -> str:
    """What a pipe sent, by its mark or as UTF-8; U+FFFD where it is not."""
    return content.decode(
        next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8"), "replace"
    )


def _no_text(path: Path, encoding: str, *, binary: bool) -> DataError:
    at = _first_wrong_byte(path, encoding)
    if binary and encoding == "utf-8":
        return DataError(f"{path} is no text but binary data (byte {at}). {_WRITE}")
    if encoding != "utf-8":
        return DataError(
            f"{path} is {encoding.upper()[:6]} text that is damaged at byte {at}. Save it as UTF-8."
        )
    return DataError(
        f"{path} is not UTF-8 text (byte {at}). Save it as UTF-8; if a Windows program of Western Europe "
        f"wrote it: `iconv -f WINDOWS-1252 -t UTF-8 {shlex.quote(str(path))} > utf8{bare_name(path).suffix}`."
    )


def _first_wrong_byte(path: Path, encoding: str) -> int:
    """Where a file, unpacked, ends to be text in `encoding`; in reading on, an error names no place."""
    decoder, done = codecs.getincrementaldecoder(encoding)(), 0
    with open_bytes(path) as file:
        while True:
            chunk = file.read(_CHUNK)
            waiting = len(decoder.getstate()[0])
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                return done - waiting + error.start
            if not chunk:
                return done
            done += len(chunk)


def _unmarked(content: bytes) -> str:
    """The encoding of a text without a byte order mark: zero bytes of Western letters tell UTF-16 and 32."""
    head = content[:_LOOKED_AT]
    places = [head[place::4].count(0) for place in range(4)]
    for least, mark in ((min(places[1:]), "utf-32-le"), (min(places[:3]), "utf-32-be")):
        if least > 0.2 * len(head):
            return mark
    zeros = head[::2].count(0), head[1::2].count(0)
    if max(zeros) > 0.2 * len(head) and min(zeros) < 0.2 * max(zeros):
        return "utf-16-be" if zeros[0] > zeros[1] else "utf-16-le"
    return "utf-8"
