"""Client of an OpenAI-compatible engine that notes when each token arrives."""

from __future__ import annotations

import json
import time
from types import TracebackType
from typing import Any

import numpy as np

from voltana_ctrl.checks import positive
from voltana_ctrl.errors import BackendError, ConfigError
from voltana_ctrl.textfile import json_value

__all__ = ["LoadClient"]

# Common words, one token each in the vocabularies that are in use.
_WORDS = ("the", "of", "and", "to", "in", "is", "that", "for", "it", "on", "as", "with", "was")
_PROBES_TOK = (32, 96)
_PROBE_OUTPUT_TOK = 8
# Chunks that may carry more than one token before the gaps between them mean something else.
_CHUNKS_PER_TOKEN = 0.9


class LoadClient:
    """Streams completions from one engine; an asynchronous context manager.

    Prompts are drawn anew for every request, so that no prefix cache has seen them.

    Parameters
    ----------
    url : str
        Address of the engine, with or without ``/v1``.
    model : str, optional
        Name of the model; asked of the engine where it is not given.
    words : bool
        Whether prompts are sent as words, to engines that take no token ids.
    token_ids : tuple of int
        Token ids of prompts are drawn from the first up to, without it, the second.
    timeout_s : float
        Seconds that the engine may be silent.
    api_key : str, optional
        Bearer token that the engine is sent.

    Raises
    ------
    ConfigError
        If httpx is missing or the URL is not one.

    Examples
    --------
    >>> len(LoadClient("http://localhost:8000", token_ids=(1000, 2000)).prompt(16))
    16
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        words: bool = False,
        token_ids: tuple[int, int] = (1000, 20_000),
        timeout_s: float = 60.0,
        api_key: str | None = None,
    ) -> None:
        positive("LoadClient.timeout_s", timeout_s)
        if not url.startswith(("http://", "https://")):
            raise ConfigError(
                f"LoadClient.url: expected an address such as http://localhost:8000, got {url!r}"
            )
        if not 0 <= token_ids[0] < token_ids[1]:
            raise ConfigError(
                f"LoadClient.token_ids: expected 0 <= lowest < highest, got {token_ids}"
            )
        self.url = url.rstrip("/").removesuffix("/v1")
        self.model = model
        self.extra_tok = 0
        self._words = words
        self._token_ids = token_ids
        self._timeout_s = timeout_s
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._rng = np.random.default_rng()
        self._http: Any = None
        self._failures: tuple[type[Exception], ...] = ()

    async def __aenter__(self) -> LoadClient:
        try:
            import httpx
        except ImportError as error:
            raise ConfigError(
                "profile: httpx is not installed; pip install 'voltana-ctrl[server]'"
            ) from error
        self._failures = (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError)
        # An engine is driven from nearby, never through a proxy of the environment.
        self._http = httpx.AsyncClient(
            timeout=self._timeout_s,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            trust_env=False,
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._http.aclose()

    def prompt(self, tok: int) -> list[int] | str:
        """Draw a prompt.

        Parameters
        ----------
        tok : int
            Number of its tokens, or of its words.

        Returns
        -------
        list of int or str
            Token ids; words, where the engine takes no ids.
        """
        if self._words:
            return " ".join(_WORDS[k] for k in self._rng.integers(len(_WORDS), size=tok))
        low, high = self._token_ids
        ids: list[int] = self._rng.integers(low, high, size=tok).tolist()
        return ids

    def request(self, prompt_tok: int, output_tok: int) -> bytes:
        """Body of a request with a new prompt, so that nothing is drawn when it is to be sent.

        Parameters
        ----------
        prompt_tok : int
            Tokens of the prompt as the engine counts them, those that it adds included.
        output_tok : int
            Tokens to generate; the engine is asked not to stop early.

        Returns
        -------
        bytes
            JSON, for :meth:`stream`.
        """
        asked = max(1, prompt_tok - self.extra_tok)
        body = {
            "model": self.model,
            "prompt": self.prompt(asked),
            "max_tokens": output_tok,
            "min_tokens": output_tok,
            "ignore_eos": True,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return json.dumps(body).encode()

    async def check(self) -> None:
        """See that the engine answers, counts prompts as we do, and streams token by token.

        Raises
        ------
        BackendError
            If it does not answer.
        ConfigError
            If what it streams cannot be measured, with the mend.
        """
        if self.model is None:
            self.model = await self._first_model()
        extra = []
        self.extra_tok = 0
        for tok in _PROBES_TOK:
            times_s: list[float] = []
            usage = await self.stream(self.request(tok, _PROBE_OUTPUT_TOK), times_s)
            extra.append(usage.get("prompt_tokens", tok if not self._words else 0) - tok)
            told_tok = usage.get("completion_tokens", _PROBE_OUTPUT_TOK)
            if not len(times_s) >= _CHUNKS_PER_TOKEN * told_tok:
                raise ConfigError(
                    f"{self.url}: {told_tok} tokens came in {len(times_s)} chunks; for the"
                    " profile let the engine stream every token (vLLM --stream-interval 1) and"
                    " switch speculative decoding off"
                )
        if extra[0] != extra[1]:
            raise ConfigError(
                f"{self.url}: prompts of {_PROBES_TOK} tokens were counted {extra} longer; the"
                " length must be known: send token ids instead of words, and no prompt template"
            )
        self.extra_tok = extra[0]

    async def _first_model(self) -> str:
        url = f"{self.url}/v1/models"
        try:
            answer = await self._http.get(url, headers=self._headers)
            if answer.status_code != 200:
                raise _refusal(url, answer.status_code, answer.content)
            return str(answer.json()["data"][0]["id"])
        except self._failures as error:
            raise _silence(url, error) from error
        except (ValueError, LookupError, TypeError) as error:
            raise BackendError(
                f"{url}: expected a list of models, got {answer.text[:200]!r}; is it an"
                " OpenAI-compatible engine? else give the model's name"
            ) from error

    async def stream(self, request: bytes, times_s: list[float]) -> dict[str, int]:
        """Send a request and note when each token arrives.

        Parameters
        ----------
        request : bytes
            What :meth:`request` returned.
        times_s : list of float
            Gets the time of each token, from ``time.perf_counter``, as it arrives.

        Returns
        -------
        dict
            The engine's `prompt_tokens` and `completion_tokens`; empty if it tells none.

        Raises
        ------
        BackendError
            If the engine refuses, fails or falls silent.
        """
        url = f"{self.url}/v1/completions"
        usage: dict[str, int] = {}
        try:
            async with self._http.stream(
                "POST", url, content=request, headers=self._headers
            ) as answer:
                if answer.status_code != 200:
                    raise _refusal(url, answer.status_code, await answer.aread())
                async for line in answer.aiter_lines():
                    now_s = time.perf_counter()
                    if not line.startswith("data:") or line.endswith("[DONE]"):
                        continue
                    chunk = json_value(line[5:], url, constants=True)
                    if "error" in chunk:
                        raise BackendError(f"{url}: the engine failed: {chunk['error']}")
                    usage = chunk.get("usage") or usage
                    # Some engines end with a chunk that says why and carries no token.
                    times_s.extend(
                        now_s
                        for choice in chunk.get("choices", ())
                        if choice.get("text") or not choice.get("finish_reason")
                    )
        except self._failures as error:
            raise _silence(url, error) from error
        except (ValueError, AttributeError, TypeError) as error:
            raise BackendError(f"{url}: expected a stream of JSON events: {error}") from error
        if not times_s:
            raise BackendError(f"{url}: the engine ended the stream without a token")
        return usage


def _refusal(url: str, status: int, content: bytes) -> BackendError:
    said = content.decode(errors="replace")[:300]
    return BackendError(f"{url}: the engine answered {status}: {said}")


def _silence(url: str, error: Exception) -> BackendError:
    return BackendError(
        f"{url}: no answer ({type(error).__name__}: {error}); is the engine up and healthy?"
    )
