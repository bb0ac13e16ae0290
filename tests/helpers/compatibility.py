"""What becomes of each field of a request, found by asking the code; prints docs/compatibility.md.

python -m tests.helpers.compatibility >docs/compatibility.md
"""

import json

from voltana_ctrl.engines.endpoints import Endpoint
from voltana_ctrl.router.body import BadBody, read_request, spliced
from voltana_ctrl.router.dialects import dynamo_pins, sglang_meeting
from voltana_ctrl.router.fields import refusal
from voltana_ctrl.router.paths import COMPLETIONS, GENERATING, OTHER_POSTS, PAGES

TEXT, CHAT = COMPLETIONS
FLEETS = (
    ("vLLM, SGLang, TensorRT-LLM together", "plain", True),
    ("vLLM apart", "vllm", False),
    ("SGLang apart", "sglang", False),
    ("Dynamo", "dynamo", False),
)
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
NAMED = {"type": "function", "function": {"name": "f"}}
#: Fields, with what they are set to: path, how the row is called, value, what it needs besides.
FIELDS = (
    (TEXT, "prompt", "text", "hi", {}),
    (TEXT, "prompt", "token ids", [1, 2, 3], {}),
    (TEXT, "prompt", "several", ["hi", "you"], {}),
    (TEXT, "prompt_embeds", "beside a prompt", ["AA=="], {}),
    (CHAT, "messages", "", [{"role": "user", "content": "hi"}], {}),
    (TEXT, "max_tokens", "", 80, {}),
    (CHAT, "max_completion_tokens", "", 80, {}),
    (TEXT, "n", "1", 1, {}),
    (TEXT, "n", "above 1", 2, {}),
    (TEXT, "best_of", "above 1", 2, {}),
    (TEXT, "use_beam_search", "true", True, {}),
    (TEXT, "stream", "true", True, {}),
    (TEXT, "stream_options", "with include_usage", {"include_usage": True}, {"stream": True}),
    (TEXT, "stream_options", "without", {"include_usage": False}, {"stream": True}),
    (TEXT, "stream_interval", "", 4, {"stream": True, "stream_options": {"include_usage": True}}),
    (TEXT, "temperature", "and top_p, top_k, seed, penalties", 0.5, {}),
    (TEXT, "stop", "", ["."], {}),
    (TEXT, "stop_token_ids", "", [2], {}),
    (TEXT, "ignore_eos", "", True, {}),
    (TEXT, "min_tokens", "", 4, {}),
    (CHAT, "logprobs", "", True, {}),
    (CHAT, "top_logprobs", "", 3, {"logprobs": True}),
    (TEXT, "prompt_logprobs", "", 1, {}),
    (TEXT, "echo", "true", True, {}),
    (CHAT, "tools", "", [TOOL], {}),
    (CHAT, "tool_choice", "auto or none", "auto", {"tools": [TOOL]}),
    (CHAT, "tool_choice", "required", "required", {"tools": [TOOL]}),
    (CHAT, "tool_choice", "named", NAMED, {"tools": [TOOL]}),
    (CHAT, "response_format", "", {"type": "json_object"}, {}),
    (TEXT, "structured_outputs", "and guided_json, regex, choice, grammar", {"regex": "a"}, {}),
    (TEXT, "logit_bias", "", {"5": 1}, {}),
    (TEXT, "bad_words", "", ["no"], {}),
    (TEXT, "allowed_token_ids", "", [1, 2], {}),
    (CHAT, "chat_template_kwargs", "", {"thinking": True}, {}),
    (CHAT, "reasoning_effort", "", "low", {}),
    (TEXT, "truncate_prompt_tokens", "", -1, {}),
    (TEXT, "cache_salt", "and priority, user", "s", {}),
    (TEXT, "kv_transfer_params", "and ec_transfer_params", {"remote_host": "x"}, {}),
    (TEXT, "bootstrap_host", "and bootstrap_port, bootstrap_room", "x", {}),
    (TEXT, "data_parallel_rank", "and routed_dp_rank, disagg_prefill_dp_rank", 1, {}),
    (TEXT, "rid", "and request_id", "mine", {}),
    (TEXT, "nvext", "wishes", {"extra_fields": ["timing"]}, {}),
    (TEXT, "nvext", "workers", {"decode_worker_id": 1}, {}),
    (TEXT, "any other", "", 1, {}),
)  # fmt: skip
ENDS = {
    kind: [
        Endpoint(instance=f"i{k}", kind=kind, url=f"http://e{k}", bootstrap_port=1, worker_id=k)
        for k in range(2)
    ]
    for kind in ("sglang", "dynamo")
}


def legs(kind, path, body):
    """What prefill and decode engine are sent (None where there is none), or a refusal."""
    try:
        asked = read_request(json.dumps(body).encode(), path=path, kind=kind)
    except BadBody as refused:
        return str(refused)
    added = {} if asked.options is None else {"stream_options": asked.options}
    if kind == "vllm" and asked.alone is None:
        handed = spliced(asked.content, {**added, "kv_transfer_params": {"remote_port": 1}})
        return json.loads(asked.prefill), json.loads(handed), None
    if kind == "sglang":
        added |= sglang_meeting(ENDS[kind][0], prompts=asked.prompts)
        both = json.loads(spliced(asked.content, added))
        return both, both, None
    if kind == "dynamo":
        added |= dynamo_pins(asked.nvext, *ENDS[kind])
    return None, json.loads(spliced(asked.content, added)), asked.alone if kind == "vllm" else None


def fate(kind, path, field, value, more):
    """One cell: passed, altered (how), left out, or refused (why)."""
    body = {"model": "m", **more, field: value}
    if path == CHAT:
        body.setdefault("messages", [])
    else:
        body.setdefault("prompt", "hi")
    told = legs(kind, path, body)
    if isinstance(told, str):
        return f"**refused**: {told.partition(',')[0]}"
    prefill, decode, alone = told
    if field not in decode:
        return "left out"
    if alone is not None:
        return f"passed; decode prefills ({alone})"
    notes = []
    if decode[field] != value:
        ours = field in ("kv_transfer_params", "bootstrap_host")
        notes.append("replaced by ours" if ours else f"altered: {json.dumps(decode[field])}")
    elif "stream_options" in decode and "stream_options" not in body:
        notes.append("altered: usage is asked for, and its event left out of the answer")
    if kind == "vllm" and prefill is not None and prefill.get(field) != decode[field]:
        kept = json.dumps(prefill[field]) if field in prefill else "not sent"
        if field != "kv_transfer_params":
            notes.append(f"to prefill: {kept}")
    return "; ".join(["passed", *notes] if not notes or "altered" not in notes[0] else notes)


def of_path(kind, path):
    """What becomes of a request to a path."""
    if path in PAGES:
        return "any decode engine that lives"
    if path in COMPLETIONS:
        return {
            "plain": "one engine", "vllm": "handed over", "sglang": "to both",
            "dynamo": "pinned at the frontend",
        }[kind]  # fmt: skip
    if refusal({}, kind=kind, generating=path in GENERATING):
        return "**refused** (400)"
    return {"plain": "one engine", "dynamo": "the frontend, not pinned"}.get(
        kind, "a decode engine, which prefills" if path in GENERATING else "a decode engine"
    )


def table(head, rows):
    """Of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def page():
    """All of docs/compatibility.md."""
    names = [name for name, _, _ in FLEETS]
    fields = [
        [f"`{field}`{f', {said}' if said else ''}",
         *(fate(kind, path, field, value, more) for _, kind, _ in FLEETS)]
        for path, field, said, value, more in FIELDS
    ]  # fmt: skip
    paths = [
        [f"`{path}`", *(of_path(kind, path) for _, kind, _ in FLEETS)]
        for path in (*COMPLETIONS, *GENERATING, *OTHER_POSTS, *PAGES)
    ]
    return INTRO.format(
        paths=table(["path", *names], paths), fields=table(["field", *names], fields)
    )


INTRO = """# Compatibility of the router

What becomes of a request on its way through [`voltana-ctrl router`](router.md). This page is made
from the code (`python -m tests.helpers.compatibility`), and a test holds it to it. *Together*: each
engine does both phases. *Apart*: prefill and decode are engines of their own. TensorRT-LLM is
served together only.

## Paths

{paths}

Everything else is 404, such as `/generate`, `/v1/audio/...`, `/v1/models/NAME`, and pages by which
engines are operated (`/sleep`, `/reset_prefix_cache`, `/abort_request`): those say something to one
engine, not to a fleet. `/v1/responses/ID` is 404, too: the answer lies in one engine. Whether an
engine has a path is for it to say; its refusal is passed on.

## Fields

{fields}

*Passed*: the engine reads what the client wrote. *Left out*: only routers say it; with
`--trust-clients` it is passed where engines do both phases. *Decode prefills*: nothing is handed
over, and the decode engine does both phases of this request; `voltana_router_decoded_alone_total`
counts them by reason. Why:

- **several sequences**: vLLM's reference to a KV cache is of one sequence. Given with several it
  makes wrong text without a word (known from vLLM's issues 52234, 38900, 43509, not tried here).
- **tool choice**: *required* and named ones fail at an answer of one token (vLLM's issue 36883),
  and left out they may change the prompt: vLLM 0.32 gives the choice to chat templates, and the
  decode engine would read another prompt's cache. `response_format` is kept for that reason.
- **tells the prompt**: log-probabilities of a prompt are made where it is computed.
- **cut prompt**: what a prompt is cut to depends on `max_tokens`, which prefill is told otherwise.

In SGLang samples of one prompt share its room (read in its tokenizer manager, not tried), so that
`n` above 1 is refused where phases are apart.

A request that a prefill engine refuses with 4xx, or that an engine refuses with our additions, is
sent again as the client wrote it, and what is said to that is the client's answer. A prefill
engine's 5xx is tried at another one, then the decode engine does both phases.
"""

if __name__ == "__main__":
    print(page(), end="")
