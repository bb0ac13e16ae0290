"""Examples in the pages of the documentation run, and give what they show."""

import doctest
import re

import pytest

from tests.helpers.paths import ROOT

DOCS = ROOT / "docs"
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def examples(text: str) -> str:
    """Every executed block of a page, as one session."""
    return "\n".join(re.findall(r"^```\{doctest\}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))


PAGES = sorted(path.stem for path in DOCS.glob("*.md") if examples(path.read_text("utf-8")))


def test_the_pages_with_examples_are_found() -> None:
    assert {"simulator", "test-your-own-policy", "tutorial"} <= set(PAGES)


@pytest.mark.parametrize("name", PAGES)
def test_page_runs(name: str, tmp_path, monkeypatch) -> None:
    session = examples((DOCS / f"{name}.md").read_text(encoding="utf-8"))
    monkeypatch.chdir(tmp_path)
    test = doctest.DocTestParser().get_doctest(session, {}, name, f"docs/{name}.md", 0)
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    told: list[str] = []
    runner.run(test, out=told.append)
    assert runner.failures == 0, "".join(told)


def test_what_is_wrong_is_seen() -> None:
    session = examples("text\n```{doctest}\n>>> 1 + 1\n3\n```\n")
    test = doctest.DocTestParser().get_doctest(session, {}, "page", None, 0)
    assert doctest.DocTestRunner().run(test, out=lambda _: None).failed == 1
