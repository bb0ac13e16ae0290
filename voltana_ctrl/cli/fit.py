"""``voltana-ctrl fit``: from a table of measured iterations to a profile, with its errors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from voltana_ctrl.cli.options import check_outputs, ladder_mhz, number, pairs

EXAMPLES = (
    "voltana-ctrl fit table.csv --out mine.toml",
    "voltana-ctrl fit a.csv b.csv --where tp=1 --name my-gpu/my-model --plot fit.png",
)


def fit(
    tables: Annotated[list[Path], typer.Argument(help="CSV or Parquet of measured iterations.")],
    like: Annotated[
        str, typer.Option(help="Profile that tells what iterations do not: memory, KV link.")
    ] = "a100-sxm-80gb/llama-3.1-8b",
    name: Annotated[str, typer.Option(help="gpu/model of the new profile.")] = "my-gpu/my-model",
    out: Annotated[Path | None, typer.Option(help="Write the profile to this .toml.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write diagnostics to this image.")] = None,
    where: Annotated[
        list[str] | None, typer.Option(help="COLUMN=VALUE: rows to use; may be repeated.")
    ] = None,
    fix: Annotated[
        list[str] | None, typer.Option(help="PARAMETER=VALUE: not fitted; may be repeated.")
    ] = None,
    ladder: Annotated[
        str | None, typer.Option(help="Supported clocks LOW:HIGH:STEP. [default: those measured]")
    ] = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs of the instance.")] = None,
    freq_mhz: Annotated[
        float | None, typer.Option(help="SM clock, where the table has no column for it.")
    ] = None,
) -> None:
    """Identify a profile from measured iterations; refuses what the table cannot support."""
    from voltana_ctrl.fit import actuator_lines, fit_table
    from voltana_ctrl.fit.result import foreign_lines
    from voltana_ctrl.profiles import load_profile
    from voltana_ctrl.report import check_plot, write_fit_plot

    check_outputs({"out": out}, suffix=".toml")
    check_outputs({"plot": plot})
    if plot is not None:
        check_plot(plot)
    donor = load_profile(like)
    result = fit_table(
        tables,
        where=dict(pairs("where", where)) or None,
        gpus=gpus,
        freq_mhz=freq_mhz,
        fixed={key: number("fix", value) for key, value in pairs("fix", fix)} or None,
    )
    if out is not None:
        result.save(out, name, donor, ladder_mhz=ladder_mhz(ladder))
    if plot is not None:
        write_fit_plot(result, plot)
    typer.echo(result.summary())
    for line in foreign_lines(result, name, donor) if out is not None else ():
        typer.echo(line)
    if result.actuators:
        fitted = result.profile(name, donor, ladder_mhz=ladder_mhz(ladder))
        typer.echo("\n".join(actuator_lines(fitted)))
