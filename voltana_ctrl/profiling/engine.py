"""What is profiled, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from voltana_ctrl.checks import positive
from voltana_ctrl.errors import BackendError, ConfigError
from voltana_ctrl.profiling.sweep import Phase

__all__ = ["Engine", "ProfileAborted", "ProfileRun"]


class ProfileAborted(BackendError):
    """A limit was passed; the rows so far are in the table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """An engine with an OpenAI-compatible server, and the GPUs it runs on.

    Parameters
    ----------
    url : str
        Address of the server.
    gpus : tuple of str
        UUIDs of its GPUs, all of them; none leaves energy out.
    prefill_url, decode_url : str, optional
        Addresses of the engines of each phase, where they have their own; `url` else.
    prefill_gpus, decode_gpus : tuple of str
        UUIDs of the GPUs of those engines.
    model : str, optional
        Name of the model, where the server has several.
    words : bool
        Whether prompts are sent as words, to a server that takes no token ids.
    token_ids : tuple of int
        Token ids of prompts are drawn from the first up to, without it, the second; all must be in
        the vocabulary.
    api_key : str, optional
        Bearer token that the server asks for.
    freq_mhz : float, optional
        SM clock at which its GPUs run, where no GPU is given to read it from.

    Raises
    ------
    ConfigError
        If there is neither a GPU nor a clock, or both; or GPUs of one phase only.

    Examples
    --------
    >>> Engine(url="http://localhost:8000", gpus=("GPU-0",)).of("decode")
    ('http://localhost:8000', ('GPU-0',))
    """

    url: str
    gpus: tuple[str, ...] = ()
    prefill_url: str | None = None
    decode_url: str | None = None
    prefill_gpus: tuple[str, ...] = ()
    decode_gpus: tuple[str, ...] = ()
    model: str | None = None
    words: bool = False
    token_ids: tuple[int, int] = (1000, 20_000)
    api_key: str | None = None
    freq_mhz: float | None = None

    def __post_init__(self) -> None:
        for name in ("gpus", "prefill_gpus", "decode_gpus"):
            if isinstance(getattr(self, name), str):
                raise ConfigError(f"Engine.{name}: expected a list of UUIDs (nvidia-smi -L)")
            object.__setattr__(self, name, tuple(getattr(self, name)))
        measured = [bool(self.of(phase)[1]) for phase in ("prefill", "decode")]
        if measured[0] != measured[1]:
            raise ConfigError("Engine: expected the GPUs of both prefill and decode, got one")
        if self.freq_mhz is not None:
            positive("Engine.freq_mhz", self.freq_mhz)
        if any(measured) == (self.freq_mhz is not None):
            raise ConfigError(
                "Engine: expected either gpus, whose clock is read, or freq_mhz, the clock they"
                f" run at; got gpus {self.gpus} and freq_mhz {self.freq_mhz}"
            )

    def of(self, phase: Phase) -> tuple[str, tuple[str, ...]]:
        """Address and GPUs of the engine of a phase.

        Parameters
        ----------
        phase : {"idle", "decode", "prefill"}
            The phase; at rest the decode engine is measured.

        Returns
        -------
        url : str
            Address of the engine.
        gpus : tuple of str
            UUIDs of its GPUs.
        """
        if phase == "prefill":
            return self.prefill_url or self.url, self.prefill_gpus or self.gpus
        return self.decode_url or self.url, self.decode_gpus or self.gpus


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileRun:
    """What one run of the profiler measured on an engine, and where it stands.

    Parameters
    ----------
    path : Path
        The CSV file with one measured point a row, from which ``fit`` makes a profile.
    measured, skipped : int
        Points that were measured in this run, and points that an earlier run had left in the file.
    wall_s : float
        Seconds that the run took.
    left_out : int
        Points that are not in the file, since they were slower than a latency limit or were sure
        to be.
    notes : tuple of str
        What a reader of the file should know, as sentences.

    Examples
    --------
    >>> from pathlib import Path
    >>> ProfileRun(path=Path("table.csv"), measured=21, skipped=0, wall_s=180.0).text()
    'table.csv: 21 points measured in 3 min, 0 were there'
    """

    path: Path
    measured: int
    skipped: int
    wall_s: float
    left_out: int = 0
    notes: tuple[str, ...] = ()

    def text(self) -> str:
        """What was measured as lines of text: a summary, then the notes."""
        first = (
            f"{self.path}: {self.measured} points measured in {self.wall_s / 60.0:.0f} min,"
            f" {self.skipped} were there"
        )
        if self.left_out:
            first += f", {self.left_out} left out as slower than the limits"
        return "\n".join([first, *self.notes])
