"""Bytes of a file -> text, whatever a spreadsheet or an export made of them.

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
from collections.abc import Callable
from pathlib import Path

from fedtune.errors import DataError

__all__ = ["bare_name", "is_workbook", "read_bytes", "read_text"]

_ZIP = b"PK\x03\x04"
_UNPACKED: dict[bytes, tuple[str, Callable[[bytes], bytes]]] = {
    b"\x1f\x8b": ("gzip", gzip.decompress),
    b"BZh": ("bzip2", bz2.decompress),
    b"\xfd7zXZ": ("xz", lzma.decompress),
}
_ENDINGS = (".gz", ".bz2", ".xz", ".zip")  # of a compressed file, after that of what is in it
_SAVE = "Open it where it was made, and save it as CSV UTF-8."
_UNPACK = "Unpack it first."
_KINDS = (  # first bytes, what it is, the way out
    (
        b"version https://git-lfs",
        "a Git LFS pointer in place of the file",
        "Run `git lfs pull` in its folder.",
    ),
    (_ZIP, "a ZIP archive of several files", "Unpack it, and name its folder."),
    (b"\xd0\xcf\x11\xe0", "a workbook or document of old Office (.xls)", _SAVE),
    (b"PAR1", "a Parquet file", "Let its name end in .parquet."),
    (b"ARROW1", "an Arrow file", "Write it as Parquet."),
    (b"\x28\xb5\x2f\xfd", "compressed by Zstandard", _UNPACK),
    (b"7z\xbc\xaf", "a 7z archive", _UNPACK),
    (b"%PDF", "a PDF document", "Copy its texts into a CSV file."),
    (b"{\\rtf", "a rich text document", _SAVE),
    (b"SQLite format 3", "an SQLite database", "Write its table as CSV or Parquet."),
)
_MARKS = (  # the longer first: UTF-32's begins as UTF-16's does
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8-sig"),
)
_LOOKED_AT = 4096  # bytes, for an encoding without a mark


def bare_name(path: Path) -> Path:
    """The name of a file without the ending of its compression."""
    return path.with_suffix("") if path.suffix.lower() in _ENDINGS else path


def read_bytes(path: Path) -> bytes:
    """The content of a file, unpacked where it is compressed; of a ZIP archive that of its only file.

    Raises:
        DataError: its compression is damaged or cut off.
        OSError: it cannot be read.
    """
    content = path.read_bytes()
    name, unpack = next(
        (how for mark, how in _UNPACKED.items() if content.startswith(mark)), ("ZIP", _only_file)
    )
    if name == "ZIP" and (not content.startswith(_ZIP) or is_workbook(content)):
        return content
    try:
        return unpack(content)
    except (OSError, EOFError, ValueError, RuntimeError, NotImplementedError, *_DAMAGED) as error:
        raise DataError(
            f"{path} is compressed by {name}, and damaged or cut off ({str(error).rstrip('.')}). Copy it "
            "again."
        ) from error


_DAMAGED = (zlib.error, lzma.LZMAError, zipfile.BadZipFile)


def _only_file(content: bytes) -> bytes:
    """The only file of a ZIP archive; the archive itself if it has several, or is locked by a password."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        # Macs add a folder of their own.
        files = [
            one for one in archive.infolist() if not one.is_dir() and not one.filename.startswith("__MACOSX")
        ]
        return archive.read(files[0]) if len(files) == 1 and not files[0].flag_bits & 1 else content


def is_workbook(content: bytes) -> bool:
    """Is this a workbook of Excel (.xlsx)?"""
    return content.startswith(_ZIP) and b"xl/workbook" in content


def read_text(path: Path, content: bytes | None = None) -> str:
    """The text of a file, without a byte order mark; line ends as they are.

    Args:
        path: names it in messages.
        content: what is in it; None: it is read.

    Raises:
        DataError: it is no text, or in an encoding that cannot be told.
        OSError: it cannot be read.
    """
    if content is None:
        content = read_bytes(path)
    if is_workbook(content):
        raise DataError(f"{path} is a workbook of Excel (.xlsx) by its content. {_SAVE}")
    for mark, what, way in _KINDS:
        if content.startswith(mark):
            raise DataError(f"{path} is {what}, by its content. {way}")
    encoding = next((name for mark, name in _MARKS if content.startswith(mark)), None) or _unmarked(content)
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        if encoding != "utf-8":
            raise DataError(
                f"{path} is {encoding.upper()[:6]} text that is damaged at byte {error.start}. Save it as "
                "UTF-8."
            ) from error
        quoted = shlex.quote(str(path))
        raise DataError(
            f"{path} is not UTF-8 text (byte {error.start}). Save it as UTF-8; if a Windows program of "
            f"Western Europe wrote it: `iconv -f WINDOWS-1252 -t UTF-8 {quoted} > "
            f"utf8{bare_name(path).suffix}`."
        ) from error
    if text[:200].lstrip().lower().startswith(("<!doctype html", "<html")):
        raise DataError(
            f"{path} is a web page (HTML), as of a download that needs a login. Download it again."
        )
    return text


def _unmarked(content: bytes) -> str:
    """The encoding of a text without a byte order mark: the zero bytes of Western letters tell UTF-16."""
    head = content[: _LOOKED_AT - _LOOKED_AT % 2]
    zeros = head[::2].count(0), head[1::2].count(0)
    if max(zeros) > 0.2 * len(head) and min(zeros) < 0.2 * max(zeros):
        return "utf-16-be" if zeros[0] > zeros[1] else "utf-16-le"
    return "utf-8"
