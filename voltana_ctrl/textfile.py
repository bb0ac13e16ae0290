"""Text and tables from files, whoever wrote them: compressed or not, with any byte-order mark."""

from __future__ import annotations

import bz2
import codecs
import gzip
import lzma
import zlib
from pathlib import Path
from typing import Any

from voltana_ctrl.errors import ConfigError

__all__ = ["is_parquet", "parquet_rows", "read_text"]

_ZSTD = b"\x28\xb5\x2f\xfd"
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# A broken byte here and there is a bad row; more is another encoding, or no text.
_MOST_ODD_FRAC = 0.02


def read_text(path: Path) -> str:
    r"""Text of a file: plain, or packed by gzip, bzip2, xz or Zstandard; without its mark.

    UTF-8, or what a byte-order mark says. Bytes that are none become U+FFFD, if they are few.

    Parameters
    ----------
    path : Path
        The file; how it is packed is told by its content.

    Raises
    ------
    ConfigError
        Naming the file, if it cannot be read, is no text or is in another encoding.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "table.csv.gz")
    ...     _ = path.write_bytes(gzip.compress("\ufeffphase,freq_mhz".encode("utf-16-le")))
    ...     read_text(path)
    'phase,freq_mhz'
    """
    data = _bytes(path)
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            return data[len(mark) :].decode(encoding, errors="replace")
    text = data.decode("utf-8", errors="replace")
    odd = text.count("\ufffd") + text.count("\x00")
    if odd > 1 + _MOST_ODD_FRAC * len(text):
        told = "UTF-16 without a mark?" if data.count(0) > len(data) // 4 else "another encoding?"
        raise ConfigError(
            f"{path}: expected text in UTF-8, got {odd} of {len(text)} characters that are none"
            f" ({told}); convert it: iconv -f ENCODING -t UTF-8"
        )
    return text


def _bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            return gzip.decompress(data)
        if data[:3] == b"BZh":
            return bz2.decompress(data)
        if data[:6] == b"\xfd7zXZ\x00":
            return lzma.decompress(data)
        if data[:4] == _ZSTD:
            return _unpacked_zstd(path, data)
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: expected a file, got none of that name") from error
    except (OSError, ValueError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ConfigError(f"{path}: expected a readable file, plain or packed; {error}") from error
    return data


def _unpacked_zstd(path: Path, data: bytes) -> bytes:
    try:
        import pyarrow
    except ImportError as error:
        raise ConfigError(
            f"{path}: Zstandard needs pyarrow (pip install pyarrow), or unpack it: zstd -d"
        ) from error
    try:
        with pyarrow.CompressedInputStream(pyarrow.BufferReader(data), "zstd") as stream:
            return bytes(stream.read())
    except (OSError, pyarrow.ArrowException) as error:
        raise ConfigError(f"{path}: expected a readable file, plain or packed; {error}") from error


def is_parquet(path: Path) -> bool:
    """Whether a file is Parquet, by its content; False where it cannot be read.

    Parameters
    ----------
    path : Path
        The file.

    Examples
    --------
    >>> is_parquet(Path("no-such.parquet"))
    False
    """
    try:
        with path.open("rb") as file:
            return file.read(4) == b"PAR1"
    except OSError:
        return False


def parquet_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a Parquet file by column.

    Parameters
    ----------
    path : Path
        The file.

    Raises
    ------
    ConfigError
        If pyarrow is missing or it cannot be read.

    Examples
    --------
    >>> parquet_rows(Path("no-such.parquet"))
    Traceback (most recent call last):
    ...
    voltana_ctrl.errors.ConfigError: no-such.parquet: cannot be read as Parquet: ...
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError(
            f"{path}: Parquet needs pyarrow (pip install pyarrow), or write CSV"
        ) from error
    try:
        rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise ConfigError(f"{path}: cannot be read as Parquet: {error}") from error
    return rows
