"""Bodies of requests and answers: what a router reads in them, and what it refuses."""

from __future__ import annotations

import json
from typing import Any, NoReturn

__all__ = ["BadBody", "PromptLengths", "parse_body", "usage_of"]

# Of English text in the vocabularies in use, until the engines tell better.
_CHARS_PER_TOK = 4.0
_LEARN_FRAC = 0.02
# A chat template adds about this much around each message.
_TOK_PER_MESSAGE = 4


class BadBody(ValueError):
    """A body that no engine needs to see.

    Examples
    --------
    >>> parse_body(b"[1, 2]")
    Traceback (most recent call last):
    ...
    voltana_ctrl.router.body.BadBody: the body must be a JSON object
    """


def parse_body(content: bytes) -> dict[str, Any]:
    """Object in a body, with the fields that decide how it is handled checked.

    Parameters
    ----------
    content : bytes
        JSON in UTF-8.

    Raises
    ------
    BadBody
        With words for the client that repeat nothing of the body.

    Examples
    --------
    >>> parse_body(b'{"prompt": "hello", "stream": true}')["stream"]
    True
    """
    try:
        body = json.loads(content.decode(), parse_constant=_refuse_constant)
    except BadBody:
        raise
    except (ValueError, RecursionError) as error:
        raise BadBody(f"the body is not valid JSON ({type(error).__name__})") from None
    if not isinstance(body, dict):
        raise BadBody("the body must be a JSON object")
    if not isinstance(body.get("stream"), bool | None):
        raise BadBody("stream: expected true or false")
    if not isinstance(body.get("stream_options"), dict | None):
        raise BadBody("stream_options: expected an object")
    return body


def _refuse_constant(name: str) -> NoReturn:
    raise BadBody(f"the body is not valid JSON ({name} is no number)")


class PromptLengths:
    """Estimates the length of prompts without a tokenizer; learns from what engines tell.

    Examples
    --------
    >>> lengths = PromptLengths()
    >>> lengths.estimate({"prompt": [1, 2, 3]}), lengths.estimate({"prompt": "x" * 400})
    (3, 100)
    >>> for _ in range(500):
    ...     lengths.learn({"prompt": "x" * 400}, prompt_tok=200)
    >>> lengths.estimate({"prompt": "x" * 400})
    200
    """

    def __init__(self) -> None:
        self._chars_per_tok = _CHARS_PER_TOK

    def estimate(self, body: dict[str, Any]) -> int:
        """Tokens of the prompt or messages of a request, at least 1.

        Parameters
        ----------
        body : dict
            The request.
        """
        chars, tok = _size(body)
        return max(1, tok + round(chars / self._chars_per_tok))

    def learn(self, body: dict[str, Any], *, prompt_tok: int) -> None:
        """Compare with an engine's own count.

        Parameters
        ----------
        body : dict
            The request.
        prompt_tok : int
            What the engine counted.
        """
        chars, tok = _size(body)
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
        return sum(map(_chars, contents)), _TOK_PER_MESSAGE * len(contents)
    prompt = body.get("prompt")
    if not isinstance(prompt, list):
        return _chars(prompt), 0
    tok = sum(1 for one in prompt if isinstance(one, int))
    tok += sum(len(one) for one in prompt if isinstance(one, list))
    return sum(_chars(one) for one in prompt if isinstance(one, str)), tok


def _chars(content: Any) -> int:
    if isinstance(content, str):
        return len(content)
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        return sum(len(text) for text in texts if isinstance(text, str))
    return 0


def usage_of(content: bytes, *, stream: bool) -> dict[str, int]:
    """Counts that an engine tells in an answer or at the end of a stream.

    Parameters
    ----------
    content : bytes
        The body, or at least the last events of the stream.
    stream : bool
        Which of the two.

    Returns
    -------
    dict
        `prompt_tokens`, `completion_tokens`, `cached_tokens`, as far as told.

    Examples
    --------
    >>> usage_of(b'{"usage": {"prompt_tokens": 5, "completion_tokens": 2}}', stream=False)
    {'prompt_tokens': 5, 'completion_tokens': 2}
    """
    if b'"usage"' not in content:
        return {}
    parts = [content]
    if stream:
        parts = [line[5:] for line in content.splitlines() if line.startswith(b"data:")]
    for part in reversed(parts):
        if b'"usage"' not in part:
            continue
        try:
            told = json.loads(part)
        except ValueError:
            continue
        usage = told.get("usage") if isinstance(told, dict) else None
        if isinstance(usage, dict):
            details = usage.get("prompt_tokens_details")
            cached = details.get("cached_tokens") if isinstance(details, dict) else None
            counts = {
                "prompt_tokens": usage.get("prompt_tokens"),
                "completion_tokens": usage.get("completion_tokens"),
                "cached_tokens": cached,
            }
            return {
                key: value
                for key, value in counts.items()
                if isinstance(value, int) and not isinstance(value, bool) and value >= 0
            }
    return {}
