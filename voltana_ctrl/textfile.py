"""Text, tables and values from files and messages, whoever wrote them.

The one place where foreign text becomes values: whatever it is, it is read within bounds, or
refused by one error of ours.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import tomllib
import zlib
from pathlib import Path
from typing import Any

from voltana_ctrl.errors import ConfigError

__all__ = ["is_parquet", "json_value", "parquet_rows", "parse_toml", "read_text", "read_toml"]

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
# What packed files may unpack to: tables pack to a tenth, some to a hundredth, bombs to less than
# a thousandth.
_UNPACKED_BYTES, _UNPACKED_TIMES = 1 << 24, 200
_INT64 = 2**63


def json_value(data: bytes | str, what: str, *, constants: bool = False) -> Any:
    """Value of a JSON text that anybody may have written.

    Parameters
    ----------
    data : bytes or str
        The text.
    what : str
        What the error calls it.
    constants : bool
        Whether NaN and infinity, which JSON does not know, are let through.

    Raises
    ------
    ConfigError
        If it is no JSON, is nested too deep or has a number of thousands of digits.

    Examples
    --------
    >>> json_value("[1, NaN]", "limits")
    Traceback (most recent call last):
    ...
    voltana_ctrl.errors.ConfigError: limits: expected JSON: NaN is no number of JSON
    """
    try:
        return json.loads(data, parse_constant=None if constants else _no_constant)
    except RecursionError:
        raise ConfigError(f"{what}: expected JSON: nested too deep") from None
    except ValueError as error:  # of text, of bytes that are none, of too many digits
        raise ConfigError(f"{what}: expected JSON: {error}") from error


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def parse_toml(text: str, what: str) -> dict[str, Any]:
    """Tables of a TOML text that anybody may have written.

    Parameters
    ----------
    text : str
        The text.
    what : str
        What the error calls it.

    Raises
    ------
    ConfigError
        If it is no TOML, nested too deep, or a whole number in it is beyond 64 bits.

    Examples
    --------
    >>> parse_toml("count = 0x" + 20 * "f", "fleet.toml")
    Traceback (most recent call last):
    ...
    voltana_ctrl.errors.ConfigError: fleet.toml: expected TOML: a whole number beyond 64 bits
    """
    try:
        tables = tomllib.loads(text)
    except RecursionError:
        raise ConfigError(f"{what}: expected TOML: nested too deep") from None
    except ValueError as error:
        raise ConfigError(f"{what}: expected TOML: {error}") from error
    values: list[Any] = [tables]
    while values:
        value = values.pop()
        if isinstance(value, dict):
            values.extend(value.values())
        elif isinstance(value, list):
            values.extend(value)
        elif isinstance(value, int) and not -_INT64 <= value < _INT64:
            raise ConfigError(f"{what}: expected TOML: a whole number beyond 64 bits")
    return tables


def read_toml(path: str | Path) -> dict[str, Any]:
    """Tables of a TOML file.

    Parameters
    ----------
    path : str or Path
        The file; plain text in UTF-8, with a byte-order mark or without.

    Raises
    ------
    ConfigError
        Naming the file, if it cannot be read or is no TOML.

    Examples
    --------
    >>> read_toml("no-such.toml")
    Traceback (most recent call last):
    ...
    voltana_ctrl.errors.ConfigError: no-such.toml: cannot be read: No such file or directory
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # not UTF-8, or a name with a NUL
        raise ConfigError(f"{path}: expected TOML: {error}") from error
    return parse_toml(text, str(path))


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
        packed: Any  # a file of bytes, of one of four libraries
        if data[:2] == b"\x1f\x8b":
            packed = gzip.GzipFile(fileobj=io.BytesIO(data))
        elif data[:3] == b"BZh":
            packed = bz2.BZ2File(io.BytesIO(data))
        elif data[:6] == b"\xfd7zXZ\x00":
            packed = lzma.LZMAFile(io.BytesIO(data))  # noqa: SIM115  closed below
        elif data[:4] == _ZSTD:
            packed = _zstd(path, data)
        else:
            return data
        with packed:
            return _unpacked(path, packed, len(data))
    except ConfigError:
        raise
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: expected a file, got none of that name") from error
    except (OSError, ValueError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ConfigError(f"{path}: expected a readable file, plain or packed; {error}") from error


def _unpacked(path: Path, packed: Any, packed_bytes: int) -> bytes:
    most = _UNPACKED_BYTES + _UNPACKED_TIMES * packed_bytes
    data: bytes = packed.read(most + 1)
    if len(data) > most:
        raise ConfigError(
            f"{path}: expected at most {most} bytes, {_UNPACKED_TIMES} times what is packed, got"
            " more; unpack it first if it is meant"
        )
    return data


def _zstd(path: Path, data: bytes) -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise ConfigError(
            f"{path}: Zstandard needs pyarrow (pip install pyarrow), or unpack it: zstd -d"
        ) from error
    try:
        return pyarrow.CompressedInputStream(pyarrow.BufferReader(data), "zstd")
    except pyarrow.ArrowException as error:
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
        # `parquet.read_table` would load pandas where it is installed, which takes a second.
        rows: list[dict[str, Any]] = parquet.ParquetFile(path).read().to_pylist()
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise ConfigError(f"{path}: cannot be read as Parquet: {error}") from error
    return rows
