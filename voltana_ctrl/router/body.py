"""Bodies of requests and answers: what a router reads in them, and what it refuses."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, NoReturn

from voltana_ctrl.router.fields import (
    ANSWER_ONLY,
    OF_ROUTERS,
    PINS,
    decodes_alone,
    n_prompts,
    n_sequences,
    refusal,
)
from voltana_ctrl.router.paths import COMPLETIONS, GENERATING

__all__ = ["Asked", "BadBody", "PromptLengths", "read_request", "spliced", "usage_of"]

# Of English text in the vocabularies in use, until the engines tell better.
_CHARS_PER_TOK = 4.0
_LEARN_FRAC = 0.02
# A chat template adds about this much around each message.
_TOK_PER_MESSAGE = 4
# Each value of a body takes about 60 bytes once it is parsed, however short it was.
_MOST_VALUES = 1_000_000
_BEGIN = re.compile(rb"\s*\{\s*(\})?")


class BadBody(ValueError):
    """A body that no engine needs to see.

    Examples
    --------
    >>> read_request(b"[1, 2]")
    Traceback (most recent call last):
    ...
    voltana_ctrl.router.body.BadBody: the body must be a JSON object
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a router must know of a request.

    Parameters
    ----------
    content : bytes
        The body as the client sent it, but for what only a router may say.
    stream : bool
        Whether it wants its tokens one by one.
    options : dict or None
        `stream_options` that ask for the usage, where the client did not; it is not in `content`.
    nvext : dict or None
        Wishes to Dynamo, without pins; where they are told, they are not in `content`.
    sequences : int
        Number of sequences in the answer.
    prompts : int or None
        Number of prompts, where they are a list.
    alone : str or None
        Why it is not handed over between engines of vLLM.
    prefill : bytes or None
        What the prefill engine of vLLM is asked, where it is handed over.
    chars, tok : int
        Size of the prompt: characters of text, and tokens known as such.

    Examples
    --------
    >>> asked = read_request(b'{"prompt": [1, 2, 3], "stream": true}')
    >>> asked.tok, asked.stream, asked.options
    (3, True, {'include_usage': True})
    """

    content: bytes
    stream: bool = False
    options: dict[str, Any] | None = None
    nvext: dict[str, Any] | None = None
    sequences: int = 1
    prompts: int | None = None
    alone: str | None = None
    prefill: bytes | None = None
    chars: int = 0
    tok: int = 0


def read_request(
    content: bytes, *, path: str = COMPLETIONS[0], kind: str = "plain", keep: bool = False
) -> Asked:
    """Read the body of a request, and check the fields that decide how it is handled.

    Parameters
    ----------
    content : bytes
        Body as it came: JSON in UTF-8.
    path : str
        Path that the client called.
    kind : str
        How requests are handed over, see :func:`~voltana_ctrl.router.dialects.dialect_of`.
    keep : bool
        Whether the client may say what otherwise only a router does.

    Returns
    -------
    Asked
        What a router must know of it.

    Raises
    ------
    BadBody
        With words for the client that repeat nothing of the body but a number.

    Examples
    --------
    >>> read_request(b'{"prompt": "hello", "kv_transfer_params": {}}').content
    b'{"prompt": "hello"}'
    """
    body = _parsed(content)
    if not isinstance(body.get("stream"), bool | None):
        raise BadBody("stream: expected true or false")
    options = body.get("stream_options")
    if not isinstance(options, dict | None):
        raise BadBody("stream_options: expected an object")
    refused = refusal(body, kind=kind, generating=path in GENERATING)
    if refused is not None:
        raise BadBody(refused)
    is_completion = path in COMPLETIONS
    stream = bool(body.get("stream"))
    ask_usage = stream and is_completion and not (options or {}).get("include_usage")
    taken = set(OF_ROUTERS) if kind != "plain" or not keep else set()
    if ask_usage:
        taken.add("stream_options")
    nvext = body.get("nvext")
    if isinstance(nvext, dict) and not keep:
        nvext = {key: value for key, value in nvext.items() if key not in PINS}
    is_pinned = nvext != body.get("nvext")
    if is_pinned:
        body["nvext"] = nvext
    if kind == "dynamo" and is_completion:
        taken.add("nvext")
    if is_pinned or not taken.isdisjoint(body):
        body = {key: value for key, value in body.items() if key not in taken}
        content = encoded(body)
    alone = decodes_alone(body) if is_completion else "other path"
    chars, tok = _size(body)
    return Asked(
        content=content,
        stream=stream,
        options={**(options or {}), "include_usage": True} if ask_usage else None,
        nvext=nvext if isinstance(nvext, dict) else None,
        sequences=n_sequences(body) if is_completion else 1,
        prompts=n_prompts(body),
        alone=alone,
        prefill=encoded(vllm_prefill(body)) if kind == "vllm" and alone is None else None,
        chars=chars,
        tok=tok,
    )


def _parsed(content: bytes) -> dict[str, Any]:
    if content.count(b",") + content.count(b"[") + content.count(b"{") > _MOST_VALUES:
        raise BadBody(f"the body has more than {_MOST_VALUES} values")
    try:
        body = json.loads(content.decode(), parse_constant=_refuse_constant)
    except BadBody:
        raise
    except (ValueError, RecursionError, MemoryError) as error:
        raise BadBody(f"the body is not valid JSON ({type(error).__name__})") from None
    if not isinstance(body, dict):
        raise BadBody("the body must be a JSON object")
    return body


def _refuse_constant(name: str) -> NoReturn:
    raise BadBody(f"the body is not valid JSON ({name} is no number)")


def encoded(body: dict[str, Any]) -> bytes:
    """JSON of a body as bytes; :class:`BadBody` if a number in it is out of range."""
    try:
        return json.dumps(body, allow_nan=False).encode()
    except ValueError:
        raise BadBody("the body is not valid JSON (a number is out of range)") from None


def spliced(content: bytes, extra: dict[str, Any]) -> bytes:
    """JSON object with more fields before its own; what follows its brace stays byte for byte.

    The caller sees to it that the object has none of these fields: one that it has would stand
    there twice.

    Parameters
    ----------
    content : bytes
        A JSON object, which is not parsed; what does not begin with a brace is returned as it is,
        without the fields.
    extra : dict
        The fields.

    Returns
    -------
    bytes
        The object with the fields.

    Raises
    ------
    BadBody
        If a number in the fields is not finite.

    Examples
    --------
    >>> spliced(b'{"prompt" : "hi"}', {"room": 7})
    b'{"room": 7, "prompt" : "hi"}'
    """
    found = _BEGIN.match(content)
    if not extra or found is None:
        return content
    begin = content.index(b"{") + 1
    comma = b"" if found[1] else b", "
    return b"{" + encoded(extra)[1:-1] + comma + content[begin:]


def vllm_prefill(body: dict[str, Any]) -> dict[str, Any]:
    """Request to the prefill engine of vLLM: one token, and its KV cache kept for another.

    Parameters
    ----------
    body : dict
        JSON object of the client's request, which is left as it is.

    Returns
    -------
    dict
        JSON object for the prefill engine.

    Examples
    --------
    >>> made = vllm_prefill({"prompt": "hi", "max_tokens": 80, "stream": True, "stop": "."})
    >>> made["max_tokens"], made["stream"], "stop" in made
    (1, False, False)
    >>> made["kv_transfer_params"]["do_remote_decode"]
    True
    """
    asked = {key: value for key, value in body.items() if key not in ANSWER_ONLY}
    asked |= {
        "stream": False,
        "max_tokens": 1,
        "kv_transfer_params": {
            "do_remote_decode": True,
            "do_remote_prefill": False,
            "remote_engine_id": None,
            "remote_block_ids": None,
            "remote_host": None,
            "remote_port": None,
        },
    }
    if "max_completion_tokens" in asked:
        asked["max_completion_tokens"] = 1
    return asked


class PromptLengths:
    """Estimates the length of prompts without a tokenizer; learns from what engines tell.

    Examples
    --------
    >>> lengths = PromptLengths()
    >>> lengths.estimate(chars=0, tok=3), lengths.estimate(chars=400, tok=0)
    (3, 100)
    >>> for _ in range(500):
    ...     lengths.learn(chars=400, tok=0, prompt_tok=200)
    >>> lengths.estimate(chars=400, tok=0)
    200
    """

    def __init__(self) -> None:
        self._chars_per_tok = _CHARS_PER_TOK

    def estimate(self, *, chars: int, tok: int) -> int:
        """Estimate the length of the prompt or messages of a request.

        Parameters
        ----------
        chars, tok : int
            Size of the prompt, see :class:`Asked`.

        Returns
        -------
        int
            Tokens, at least 1.
        """
        return max(1, tok + round(chars / self._chars_per_tok))

    def learn(self, *, chars: int, tok: int, prompt_tok: int) -> None:
        """Learn from an engine's own count; short texts are left alone.

        Parameters
        ----------
        chars, tok : int
            Size of the prompt, see :class:`Asked`.
        prompt_tok : int
            Tokens of the prompt as the engine counted them.
        """
        text_tok = prompt_tok - tok
        # Short texts tell more of the template than of the language.
        if chars >= 64 and text_tok > 0:
            seen = min(max(chars / text_tok, 0.5), 16.0)
            self._chars_per_tok += _LEARN_FRAC * (seen - self._chars_per_tok)


def _size(body: dict[str, Any]) -> tuple[int, int]:
    """Characters of text, and tokens known as such."""
    messages = body.get("messages")
    if isinstance(messages, list):
        contents = [one.get("content") for one in messages if isinstance(one, dict)]
        contents.append(body.get("system"))
        return sum(map(_chars, contents)), _TOK_PER_MESSAGE * len(messages)
    prompt = body.get("prompt", body.get("input"))
    if not isinstance(prompt, list):
        return _chars(prompt), 0
    tok = sum(1 for one in prompt if isinstance(one, int))
    tok += sum(len(one) for one in prompt if isinstance(one, list))
    chars = sum(_chars(one) for one in prompt if isinstance(one, str))
    return chars + sum(_chars(one.get("content")) for one in prompt if isinstance(one, dict)), tok


def _chars(content: Any) -> int:
    if isinstance(content, str):
        return len(content)
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        return sum(len(text) for text in texts if isinstance(text, str))
    return 0


def usage_of(content: bytes) -> dict[str, int]:
    """Counts that an engine tells in an answer or an event.

    Parameters
    ----------
    content : bytes
        JSON.

    Returns
    -------
    dict
        `prompt_tokens`, `completion_tokens`, `cached_tokens`, as far as told, also where the
        Responses and Messages interfaces name them otherwise.

    Examples
    --------
    >>> usage_of(b'{"usage": {"prompt_tokens": 5, "completion_tokens": 2}}')
    {'prompt_tokens': 5, 'completion_tokens': 2}
    >>> usage_of(b'{"response": {"usage": {"input_tokens": 5, "output_tokens": 2}}}')
    {'prompt_tokens': 5, 'completion_tokens': 2}
    """
    if b'"usage"' not in content:
        return {}
    try:
        told = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    for name in ("response", "message"):
        if isinstance(told, dict) and isinstance(told.get(name), dict):
            told = told[name]
    usage = told.get("usage") if isinstance(told, dict) else None
    if not isinstance(usage, dict):
        return {}
    details = usage.get("prompt_tokens_details", usage.get("input_tokens_details"))
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    counts = {
        "prompt_tokens": usage.get("prompt_tokens", usage.get("input_tokens")),
        "completion_tokens": usage.get("completion_tokens", usage.get("output_tokens")),
        "cached_tokens": usage.get("cache_read_input_tokens") if cached is None else cached,
    }
    return {
        key: value
        for key, value in counts.items()
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 40
    }
