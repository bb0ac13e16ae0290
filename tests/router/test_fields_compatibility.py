"""The page on compatibility says what the code does."""

import pytest

from tests.helpers.compatibility import FIELDS, fate, page
from tests.helpers.mock_engine import MockEngine  # noqa: F401  # skips without the server extra
from voltana_ctrl.router.fields import ANSWER_ONLY, OF_ROUTERS


def test_the_page_is_made_from_the_code(root):
    assert (root / "docs" / "compatibility.md").read_text(encoding="utf-8") == page()


def test_every_field_that_is_handled_has_a_row():
    rows = " ".join(f"{field} {said}" for _, field, said, _, _ in FIELDS)
    grouped = {"include_stop_str_in_output", "logprob_token_ids", "repetition_detection",
               "thinking_token_budget", "guided_decoding_backend"}  # fmt: skip
    for name in (*OF_ROUTERS, *ANSWER_ONLY):
        told = name in rows or name.startswith(("guided_", "return_")) or name in grouped
        assert told, name


@pytest.mark.parametrize("field", ["kv_transfer_params", "rid", "data_parallel_rank"])
def test_what_only_routers_say_is_never_passed(field):
    for kind in ("plain", "vllm", "sglang", "dynamo"):
        told = fate(kind, "/v1/completions", field, "mine", {})
        assert told in ("left out", "passed; replaced by ours")
