"""The paths that a router serves, and what is asked of an engine on each."""

from __future__ import annotations

__all__ = ["COMPLETIONS", "GENERATING", "OTHER_POSTS", "PAGES"]

#: Requests that a router understands whole: handed over from prefill to decode, usage counted.
COMPLETIONS = ("/v1/completions", "/v1/chat/completions")
#: Requests that generate as well, in other words; passed to one engine, which does both phases.
GENERATING = ("/v1/responses", "/v1/messages")
#: Requests that are answered in one piece without generating.
OTHER_POSTS = (
    "/v1/embeddings", "/v1/rerank", "/rerank", "/v1/score", "/score", "/pooling", "/classify",
    "/tokenize", "/detokenize", "/v1/messages/count_tokens",
)  # fmt: skip
#: Pages of any engine that lives.
PAGES = ("/v1/models", "/version")
