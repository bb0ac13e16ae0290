"""Fields of requests: which a client may set, which shape the prompt, which only the answer."""

from __future__ import annotations

from typing import Any

__all__ = ["ANSWER_ONLY", "OF_ROUTERS", "decodes_alone", "n_prompts", "n_sequences", "refusal"]

#: Only routers say these: where a KV cache lies, which worker or rank computes, how engines
#: name a request. A client that could would read another's cache or make engines refuse.
OF_ROUTERS = (
    "kv_transfer_params", "ec_transfer_params", "bootstrap_host", "bootstrap_port",
    "bootstrap_room", "data_parallel_rank", "routed_dp_rank", "disagg_prefill_dp_rank", "rid",
    "request_id",
)  # fmt: skip
#: Workers named in `nvext`, as Dynamo reads it.
PINS = ("backend_instance_id", "prefill_worker_id", "decode_worker_id", "dp_rank")
#: Headers that say the same.
ROUTING_HEADERS = (
    b"x-data-parallel-rank", b"x-dynamo-prefill-instance-id", b"x-dynamo-worker-instance-id",
    b"x-worker-instance-id", b"x-prefiller-host-port",
)  # fmt: skip
#: They constrain or describe the answer and leave the prompt as it is: not for the engine that
#: makes one token. `response_format` stays, since vLLM gives it to chat templates.
ANSWER_ONLY = (
    "stream_options", "stream_interval", "min_tokens", "stop", "stop_token_ids",
    "include_stop_str_in_output", "logprobs", "top_logprobs", "logprob_token_ids",
    "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar",
    "guided_decoding_backend", "bad_words", "allowed_token_ids", "logit_bias",
    "repetition_detection", "thinking_token_budget", "return_token_ids",
    "return_tokens_as_token_ids", "return_token_offsets",
)  # fmt: skip


def n_prompts(body: dict[str, Any]) -> int | None:
    """Number of prompts where a request brings a list of them.

    Parameters
    ----------
    body : dict
        JSON object of the request.

    Returns
    -------
    int or None
        None where there is one prompt, such as a text or the token ids of one.

    Examples
    --------
    >>> n_prompts({"prompt": ["one", "two"]}), n_prompts({"prompt": [17, 4]})
    (2, None)
    """
    prompt = body.get("prompt")
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        return len(prompt)
    return None


def n_sequences(body: dict[str, Any]) -> int:
    """Number of sequences in the answer to a request: its prompts times samples of each.

    Parameters
    ----------
    body : dict
        JSON object of the request.

    Returns
    -------
    int
        At least 1.

    Examples
    --------
    >>> n_sequences({"prompt": ["one", "two"], "n": 3}), n_sequences({"messages": []})
    (6, 1)
    """
    embeds = body.get("prompt_embeds")
    more = len(embeds) if isinstance(embeds, list) else int(embeds is not None)
    given = n_prompts(body) or int(body.get("prompt") is not None)
    return max(1, given + more) * _samples(body, "n")


def _samples(body: dict[str, Any], *names: str) -> int:
    given = [_whole(body.get(name)) for name in names]
    return max([1, *(one for one in given if 0 < one < 1 << 20)])


def _whole(value: object) -> int:
    """The whole number that an engine may take this for, 0 if for none: 2, 2.0, and "2"."""
    if isinstance(value, str) and value.strip().isascii() and len(value) < 32:
        try:
            value = float(value)
        except ValueError:
            return 0
    if isinstance(value, (int, float)) and abs(value) < 1 << 20 and value == int(value):
        return int(value)
    return 0


def decodes_alone(body: dict[str, Any]) -> str | None:
    """Why a request cannot be handed from a prefill engine of vLLM to a decode engine.

    The reference to a KV cache is one of one sequence, and a prompt that is rendered otherwise on
    the two engines would be read with the wrong cache: such requests go to the decode engine
    alone, which prefills them itself.

    Parameters
    ----------
    body : dict
        JSON object of the request.

    Returns
    -------
    str or None
        The reason in a few words; None where it can be handed over.

    Examples
    --------
    >>> decodes_alone({"prompt": ["one", "two"]})
    'several sequences'
    >>> decodes_alone({"prompt": "one", "n": 1}) is None
    True
    """
    if n_sequences(body) > 1 or _samples(body, "best_of") > 1 or body.get("use_beam_search"):
        return "several sequences"
    if body.get("echo") or body.get("prompt_logprobs") is not None:
        return "tells the prompt"
    choice = body.get("tool_choice")
    # Kept it fails at one token; left out the prompt may be another.
    if choice == "required" or isinstance(choice, dict):
        return "tool choice"
    # The length that a prompt is cut to is what `max_tokens` leaves.
    if body.get("truncate_prompt_tokens") is not None:
        return "cut prompt"
    return None


def refusal(body: dict[str, Any], *, kind: str, generating: bool) -> str | None:
    """Why no engine of a fleet can answer a request rightly.

    Parameters
    ----------
    body : dict
        JSON object of the request.
    kind : str
        How requests are handed over, see :func:`~voltana_ctrl.router.dialects.dialect_of`.
    generating : bool
        Whether its path is one that generates without being one of the two completions.

    Returns
    -------
    str or None
        What is wrong and what to do, in words for the client; None where it can be answered.

    Examples
    --------
    >>> refusal({"prompt": "hi", "n": 2}, kind="sglang", generating=False)
    'n: expected 1 where prefill and decode are apart in SGLang, got 2; send the request n times'
    """
    if kind != "sglang":
        return None
    if generating:
        return (
            "this path: SGLang does not serve it where prefill and decode are apart; use"
            " /v1/chat/completions"
        )
    samples = _samples(body, "n")
    if samples > 1:
        return (
            "n: expected 1 where prefill and decode are apart in SGLang, got"
            f" {samples}; send the request n times"
        )
    return None
