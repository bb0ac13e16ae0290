"""Requests of a workload sent to a running server at their times, and how they were answered."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from voltana_ctrl.checks import F64, positive
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.sim.workload import Workload
from voltana_ctrl.types import Slo

__all__ = ["Answers", "play"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Answers:
    """How the requests that were sent were answered, in the order of the workload.

    Parameters
    ----------
    arrival_s : ndarray, shape (k,)
        Seconds from the start at which each request was sent.
    ttft_s, itl_s : ndarray, shape (k,)
        Its time to first token and its mean gap between tokens, in seconds; NaN where it failed.

    Examples
    --------
    >>> import numpy as np
    >>> from voltana_ctrl import Slo
    >>> told = Answers(arrival_s=np.zeros(2), ttft_s=np.array([0.5, np.nan]), itl_s=np.zeros(2))
    >>> told.attainment(Slo(ttft_s=0.6, itl_s=0.06))
    (0.5, 0.5)
    """

    arrival_s: F64
    ttft_s: F64
    itl_s: F64

    def attainment(self, slo: Slo) -> tuple[float, float]:
        """Which part of the requests met the promises; one that failed has missed both.

        Parameters
        ----------
        slo : Slo
            The promises.

        Returns
        -------
        ttft_frac, itl_frac : float
            Fractions that met the TTFT and the ITL; NaN without a request.
        """
        answered = np.isfinite(self.ttft_s)
        met_ttft = answered & (self.ttft_s <= slo.ttft_s)
        met_itl = answered & (self.itl_s <= slo.itl_s)
        return float(met_ttft.mean()), float(met_itl.mean())


async def play(
    url: str,
    workload: Workload,
    *,
    dilation: float = 1.0,
    on_answer: Callable[[float, float, float], None] = lambda *_: None,
    stop: Callable[[], bool] = lambda: False,
    limit_s: float = 600.0,
) -> Answers:
    """Send a workload's requests at their times, stretched, and wait for the answers.

    Parameters
    ----------
    url : str
        Address of the server, without a path.
    workload : Workload
        Arrival times and lengths. Requests are sent at these times, whatever was answered.
    dilation : float
        Factor on the times between arrivals; 2 sends half as many a second.
    on_answer : callable, optional
        Called for each whole answer with the monotonic time of its last token, its TTFT and its
        ITL, all in seconds.
    stop : callable
        Returns whether to send no more; answers that are still awaited are then given up.
    limit_s : float
        Seconds after which an answer counts as failed.

    Returns
    -------
    Answers
        Of the requests that were sent. Times are as they passed here, not divided by `dilation`.

    Raises
    ------
    ConfigError
        If aiohttp is not installed, or `dilation` is not positive.

    Examples
    --------
    >>> import asyncio
    >>> asyncio.iscoroutinefunction(play)
    True
    """
    positive("play.dilation", dilation)
    try:
        import aiohttp
    except ImportError as error:
        raise ConfigError(
            "load: aiohttp is not installed; pip install 'voltana-ctrl[server]'"
        ) from error
    n = len(workload.arrival_s)
    sent_s, ttft_s, itl_s = (np.full(n, np.nan) for _ in range(3))
    begin_s = time.monotonic()
    timeout = aiohttp.ClientTimeout(total=limit_s)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:

        async def ask(k: int) -> None:
            body = {
                "model": "emulated",
                "prompt": [1] * int(workload.prompt_tok[k]),
                "max_tokens": int(workload.output_tok[k]),
                "stream": True,
            }
            asked_s = time.monotonic()
            first_s = last_s = np.nan
            tokens = 0
            try:
                async with session.post(f"{url}/v1/completions", json=body) as answer:
                    if answer.status != 200:
                        return
                    async for line in answer.content:
                        if not line.startswith(b"data: {") or b'"choices"' not in line:
                            continue
                        last_s = time.monotonic()
                        tokens += 1
                        first_s = last_s if tokens == 1 else first_s
            except (aiohttp.ClientError, TimeoutError, OSError):
                return
            if tokens >= int(workload.output_tok[k]):
                ttft_s[k] = first_s - asked_s
                itl_s[k] = (last_s - first_s) / (tokens - 1) if tokens > 1 else 0.0
                on_answer(last_s, float(ttft_s[k]), float(itl_s[k]))

        asking: set[asyncio.Task[None]] = set()
        for k in range(n):
            due_s = begin_s + dilation * float(workload.arrival_s[k])
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            if stop():
                break
            sent_s[k] = time.monotonic() - begin_s
            task = asyncio.create_task(ask(k))
            asking.add(task)
            task.add_done_callback(asking.discard)
        while asking and not stop():
            await asyncio.wait(asking, timeout=0.5)
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
    asked = np.isfinite(sent_s)
    return Answers(arrival_s=sent_s[asked], ttft_s=ttft_s[asked], itl_s=itl_s[asked])
