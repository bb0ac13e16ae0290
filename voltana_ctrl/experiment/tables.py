"""Results as files: JSON written whole or not at all, CSV, Parquet, a data frame of pandas."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from voltana_ctrl.errors import ConfigError
from voltana_ctrl.files import whole_file
from voltana_ctrl.sim.detail import RunDetail

if TYPE_CHECKING:
    from pandas import DataFrame

_MEND = "pip install 'voltana-ctrl[tables]'"


def write_json(values: Mapping[str, Any], path: str | Path) -> None:
    r"""Write JSON; whoever reads the file finds the old one or the new one, never half of it.

    Parameters
    ----------
    values : mapping
        What to write: numbers, text, lists and mappings of such.
    path : str or Path
        The file. A pipe or ``/dev/stdout``, which cannot be replaced, is written as it is.

    Raises
    ------
    ConfigError
        If the file cannot be written.
    ValueError
        If a number is NaN or infinite, which JSON has not.
    TypeError
        If a value is none that JSON has.

    Examples
    --------
    >>> from pathlib import Path
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_json({"runs": []}, Path(folder) / "out.json")
    ...     (Path(folder) / "out.json").read_text()
    '{\n "runs": []\n}\n'
    """
    text = json.dumps(dict(values), indent=1, allow_nan=False) + "\n"
    with whole_file(path) as beside:
        beside.write_text(text, encoding="utf-8")


def check_table(path: str | Path) -> None:
    """Refuse a table that could not be written, before anything runs.

    Parameters
    ----------
    path : str or Path
        Ending in .csv or .parquet.

    Raises
    ------
    ConfigError
        If it ends otherwise, or pyarrow, which Parquet needs, is not installed.

    Examples
    --------
    >>> check_table("out.xlsx")
    Traceback (most recent call last):
    voltana_ctrl.errors.ConfigError: out.xlsx: expected a .csv or .parquet file
    """
    suffix = Path(path).suffix
    if suffix not in (".csv", ".parquet"):
        raise ConfigError(f"{path}: expected a .csv or .parquet file")
    if suffix == ".parquet":
        load_pyarrow()


def write_rows(rows: Iterable[Mapping[str, Any]], path: str | Path) -> None:
    """Write rows to a .csv or .parquet file; a value that does not exist is empty.

    Parameters
    ----------
    rows : iterable of mapping
        Column to value; columns stand in the order in which they are first seen.
    path : str or Path
        Ending in .csv or .parquet.

    Raises
    ------
    ConfigError
        If the file cannot be written, or Parquet is asked for without pyarrow.

    Examples
    --------
    >>> from pathlib import Path
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_rows([{"policy": "mine", "energy_j": 3.0}], Path(folder) / "out.csv")
    ...     (Path(folder) / "out.csv").read_text().split()
    ['policy,energy_j', 'mine,3.0']
    """
    check_table(path)
    rows = list(rows)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with whole_file(path) as beside:
        if Path(path).suffix == ".parquet":
            _, parquet = load_pyarrow()
            parquet.write_table(arrow_table(rows, columns), beside)
            return
        with beside.open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, columns)
            table.writeheader()
            table.writerows(rows)


def dataframe(rows: Sequence[Mapping[str, Any]]) -> DataFrame:
    """Make a data frame of rows.

    Parameters
    ----------
    rows : sequence of mapping
        Column to value.

    Returns
    -------
    pandas.DataFrame
        One line a row, with a column for each key.

    Raises
    ------
    ConfigError
        If pandas is not installed.

    Examples
    --------
    >>> dataframe([{"policy": "mine", "energy_j": 3.0}])["energy_j"].sum()
    np.float64(3.0)
    """
    try:
        import pandas
    except ImportError as error:
        raise ConfigError(f"to_dataframe: needs pandas; {_MEND}") from error
    return pandas.DataFrame.from_records(list(rows))


def series_rows(
    runs: Sequence[Mapping[str, Any]], details: Sequence[RunDetail | None]
) -> Iterator[dict[str, Any]]:
    """Rows of instances over time: one a run, interval and instance.

    Parameters
    ----------
    runs : sequence of mapping
        Their policy, rate and seed are repeated in each row.
    details : sequence of RunDetail or None
        One per run.

    Yields
    ------
    dict
        Interval `from_s` to `until_s`, mean clock, decode batch and power; None where an
        instance did not work.

    Raises
    ------
    ConfigError
        If details were not kept.

    Examples
    --------
    >>> from voltana_ctrl import compare
    >>> found = compare(rates_req_s=[5.0], duration_s=12.0, warmup_s=0.0,
    ...                 policies=["static-max"], detail=True)
    >>> rows = list(series_rows(found.runs, found.details))
    >>> len(rows), rows[0]["role"], rows[0]["until_s"]
    (480, 'prefill', 0.1)
    """
    if len(details) != len(runs):
        raise ConfigError("series: details of the runs were not kept; compare(..., detail=True)")
    for run, detail in zip(runs, details, strict=True):
        if detail is None:
            continue
        prefill, decode = set(detail.prefill.tolist()), set(detail.decode.tolist())
        for row in range(len(detail.power_w)):
            for instance in range(detail.power_w.shape[1]):
                role = "decode" if instance in decode else "prefill"
                yield {
                    "policy": run["policy"],
                    "rate_req_s": run["rate_req_s"],
                    "seed": run["seed"],
                    "instance": instance,
                    "role": "colocated" if instance in prefill & decode else role,
                    "from_s": round(float(detail.edge_s[row]), 9),
                    "until_s": round(float(detail.edge_s[row + 1]), 9),
                    "freq_mhz": _number(detail.freq_mhz[row, instance]),
                    "batch_req": _number(detail.batch_req[row, instance]),
                    "power_w": _number(detail.power_w[row, instance]),
                }


def _number(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None


def arrow_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> Any:
    """Make an Arrow table of rows; a value that does not exist is null."""
    pyarrow, _ = load_pyarrow()
    return pyarrow.table({name: [row.get(name) for row in rows] for name in columns})


def load_pyarrow() -> tuple[Any, Any]:
    """Import pyarrow and its Parquet module, or say how to get them."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(f"a store, as any Parquet file, needs pyarrow; {_MEND}") from error
    return pyarrow, pyarrow.parquet
