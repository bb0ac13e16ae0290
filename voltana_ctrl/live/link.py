"""The line of a node or a router to its controller: reports go out, orders come in."""

from __future__ import annotations

import logging
import ssl
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from voltana_ctrl.checks import positive
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.live.messages import (
    LEAST_TOKEN,
    MAX_BYTES,
    MessageRefused,
    decode_orders,
    encode_report,
)
from voltana_ctrl.live.orders import Orders, Report, SenderKind, new_start
from voltana_ctrl.types import (
    FleetSpec,
    FleetState,
    IterationBatch,
    Observation,
    RequestBatch,
)

__all__ = ["ControllerLink"]

_log = logging.getLogger(__name__)

_MOST_BATCHES = 200


class ControllerLink:
    """Sends reports and receives orders, in a thread of its own.

    Orders are in force from when they were asked for until they lapse. Of one start of the
    controller only newer ones are taken, and another start only once the last ones have lapsed:
    two controllers cannot take turns.

    Parameters
    ----------
    url : str
        Address of the controller, such as ``https://10.0.0.1:8791``.
    token : str
        Bearer token that the controller asks for.
    fleet : FleetSpec
        The whole fleet.
    sender : str
        Name of this node or router.
    ids : sequence of str
        Ids of the instances that it reports; of a router, those of the fleet.
    kind : {"node", "router"}
        Who reports.
    limit_s : float
        Seconds that an answer may take.
    hold_s : float
        Most seconds that orders hold without newer ones, whatever they say.
    tls_ca : Path, optional
        Certificates of the authorities that the controller's may be signed by; those of the
        system if left out.
    problems, delay_s : callable
        Return what is wrong with instances, in words, and the delays of their clocks in seconds,
        both by the id of the instance; sent with every report.
    now_s : callable
        Returns seconds that never go back.

    Raises
    ------
    ConfigError
        If httpx is not installed, the URL is none, the token is too short, an instance is not of
        the fleet, or the certificates cannot be read.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, load_profile
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> with ControllerLink("http://127.0.0.1:9", "0123456789abcdef", fleet, "n0",
    ...                     ["decode-0"]) as link:
    ...     link.orders() is None
    True
    """

    def __init__(
        self,
        url: str,
        token: str,
        fleet: FleetSpec,
        sender: str,
        ids: Sequence[str],
        *,
        kind: SenderKind = "node",
        limit_s: float = 0.5,
        hold_s: float = 1.0,
        tls_ca: Path | None = None,
        problems: Callable[[], Mapping[str, str]] = dict,
        delay_s: Callable[[], Mapping[str, float]] = dict,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        positive("ControllerLink.limit_s", limit_s)
        positive("ControllerLink.hold_s", hold_s)
        strange = sorted(set(ids) - set(fleet.ids))
        if strange or not ids:
            raise ConfigError(
                f"ControllerLink.ids: expected instances of {', '.join(fleet.ids)}, got"
                f" {strange[0] if strange else 'none'!r}"
            )
        try:
            import httpx
        except ImportError as error:
            raise ConfigError(
                "controller: httpx is not installed; pip install 'voltana-ctrl[server]'"
            ) from error
        if len(token) < LEAST_TOKEN:
            raise ConfigError(
                f"token: expected at least {LEAST_TOKEN} characters, got {len(token)}; it is that"
                " of the controller"
            )
        self._errors = (httpx.HTTPError, httpx.InvalidURL)
        try:
            self._client = httpx.Client(
                base_url=url,
                headers={"Authorization": f"Bearer {token}"},
                timeout=limit_s,
                trust_env=False,
                verify=_trusted(tls_ca),
            )
        except (httpx.InvalidURL, ValueError) as error:
            raise ConfigError(
                f"controller: expected http://HOST:PORT, got {url!r}: {error}"
            ) from error
        if self._client.base_url.scheme not in ("http", "https"):
            raise ConfigError(f"controller: expected http://HOST:PORT, got {url!r}")
        self._fleet, self._sender, self._kind = fleet, sender, kind
        self._ids = tuple(ids)
        self._where = [fleet.ids.index(name) for name in ids]
        self._hold_s, self._now_s = hold_s, now_s
        self._problems, self._delay_s = problems, delay_s
        self.failure: str | None = None
        self._start, self._number = new_start(), 0
        self._pending: list[Observation] = []
        self._last: tuple[Orders, float] | None = None
        self._lock = threading.Lock()
        self._news, self._closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="voltana-ctrl-link", daemon=True)
        self._thread.start()

    def tell(self, observation: Observation) -> None:
        """Report this as soon as the line is free; returns at once.

        Parameters
        ----------
        observation : Observation
            Of the whole fleet; only the part of `ids` is sent.
        """
        with self._lock:
            self._pending = [*self._pending[-_MOST_BATCHES:], observation]
        self._news.set()

    def orders(self) -> Orders | None:
        """The orders in force.

        Returns
        -------
        Orders or None
            None before the first ones, and once the last ones have lapsed.
        """
        last = self._last
        return None if last is None or self._lapsed(*last) else last[0]

    def last(self) -> tuple[Orders, float] | None:
        """The last orders that came, in force or not.

        Returns
        -------
        (Orders, age_s) or None
            With the seconds since they were asked for; None before the first ones.
        """
        last = self._last
        return None if last is None else (last[0], max(0.0, self._now_s() - last[1]))

    def _lapsed(self, orders: Orders, asked_s: float) -> bool:
        return not 0.0 <= self._now_s() - asked_s <= min(orders.valid_s, self._hold_s)

    def _run(self) -> None:
        while not self._closed.is_set():
            self._news.wait()
            self._news.clear()
            with self._lock:
                pending, self._pending = self._pending, []
            # A report whose answer is lost may have been heard: it is sent again as the same.
            told_s = self._now_s()
            while pending and not self._closed.is_set() and not self._reported(pending, told_s):
                if self._now_s() - told_s > self._hold_s:
                    # What happened without a controller would look like a burst to the next one.
                    with self._lock:
                        self._pending = self._pending[-1:]
                    break
                self._closed.wait(0.1)
            self._number += 1

    def _reported(self, pending: Sequence[Observation], told_s: float) -> bool:
        """Report once; whatever goes wrong with it, the line stays open for the next."""
        try:
            return self._report(pending, told_s)
        except Exception as error:  # noqa: BLE001  the next report may well be heard
            self.failure = f"controller: {type(error).__name__}: {error}"
            _log.exception("voltana-ctrl: a report to the controller failed")
            return True  # the same report would fail again

    def _report(self, pending: Sequence[Observation], told_s: float) -> bool:
        sent_s = self._now_s()
        try:
            report = Report(
                kind=self._kind,
                sender=self._sender,
                start=self._start,
                number=self._number,
                ids=self._ids,
                observation=_part(pending, self._where, older_s=sent_s - told_s),
                problems=self._ours(self._problems()),
                delay_s=self._ours(self._delay_s()),
            )
            answer = self._client.post(
                "/v1/report",
                content=encode_report(report, self._fleet),
                headers={"Content-Type": "application/json"},
            )
            if answer.status_code == 503:
                self.failure = f"controller: {answer.text[:200]}"
                return True  # it took the report, and has no orders
            if answer.status_code != 200:
                self.failure = f"controller: status {answer.status_code}: {answer.text[:200]}"
                return answer.status_code == 422  # it would be refused again
            if len(answer.content) > MAX_BYTES:
                raise MessageRefused("the answer is too long")
            orders = decode_orders(answer.content, self._fleet)
            if set(orders.orders) != set(self._ids):
                raise MessageRefused("the orders are for other instances")
            self._take(orders, sent_s)
        except MessageRefused as error:
            self.failure = f"controller: {error}"
            return True  # the same report would be refused again
        except self._errors as error:
            self.failure = f"controller: {type(error).__name__}: {error}"
            return False
        self.failure = None
        return True

    def _ours(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in values.items() if name in self._ids}

    def _take(self, orders: Orders, asked_s: float) -> None:
        """Take orders over, from when they were asked for: what they rest on is no younger."""
        if self._last is not None:
            before, before_s = self._last
            if orders.start != before.start and not self._lapsed(before, before_s):
                raise MessageRefused("two controllers give orders; end one of them")
            if orders.start == before.start and orders.number < before.number:
                return  # overtaken on the way
        self._last = (orders, asked_s)

    def close(self) -> None:
        """Hang up; may be called twice."""
        self._closed.set()
        self._news.set()
        self._thread.join(5.0)
        self._client.close()

    def __enter__(self) -> ControllerLink:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _trusted(tls_ca: Path | None) -> Any:
    """What httpx takes for `verify`."""
    if tls_ca is None:
        return True
    try:
        return ssl.create_default_context(cafile=str(tls_ca))
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"tls-ca {tls_ca}: cannot be read as certificates: {error}") from error


def _part(
    pending: Sequence[Observation], where: Sequence[int], *, older_s: float = 0.0
) -> Observation:
    """Latest state of these instances, so much older by now, and all that happened to them."""
    state = pending[-1].state
    columns: dict[str, Any] = {
        name: getattr(state, name)[where] for name in FleetState.__slots__ if name != "t_s"
    }
    for name in ("arrived_req", "arrived_tok"):
        columns[name] = np.sum([getattr(one.state, name)[where] for one in pending], axis=0)
    columns["age_s"] = columns["age_s"] + older_s
    iterations = [one.iterations for one in pending if len(one.iterations)]
    finished = [one.finished for one in pending if len(one.finished)]
    return Observation(
        state=FleetState(t_s=state.t_s, **columns),
        iterations=_rows(IterationBatch, iterations, where, ("instance",)),
        finished=_rows(RequestBatch, finished, where, ("prefill_instance", "decode_instance")),
    )


def _rows(kind: Any, batches: Sequence[Any], where: Sequence[int], names: Sequence[str]) -> Any:
    """Rows of all batches that concern those instances, and hold numbers only."""
    if not batches:
        return kind.empty()
    columns = {
        name: np.concatenate([getattr(one, name) for one in batches]) for name in kind.__slots__
    }
    ours = np.any([np.isin(columns[name], where) for name in names], axis=0)
    for column in columns.values():
        ours &= np.isfinite(column)
    return kind(**{name: column[ours][-5000:] for name, column in columns.items()})
