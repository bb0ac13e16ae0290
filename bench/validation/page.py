"""Tables of the validation pages: named blocks of Markdown, written or compared.

<!-- table NAME -->
| ... |
<!-- end -->
"""

import re

_BLOCK = re.compile(r"<!-- table (?P<name>\S+) -->\n(?P<rows>.*?)\n?<!-- end -->", re.DOTALL)
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def tables_of(text):
    """Rows of every named table of a page."""
    return {found["name"]: found["rows"].splitlines() for found in _BLOCK.finditer(text)}


def with_tables(text, made):
    """The page with these tables in place of its own."""

    def put(found):
        rows = made.get(found["name"], found["rows"].splitlines())
        return f"<!-- table {found['name']} -->\n" + "\n".join(rows) + "\n<!-- end -->"

    return _BLOCK.sub(put, text)


def unlike(one, other):
    """Rows that differ by more than one unit of the last digit that is printed."""
    if len(one) != len(other):
        return [f"{len(one)} rows, {len(other)} rows"]
    return [f"{a}\n{b}" for a, b in zip(one, other, strict=True) if not _alike(a, b)]


def _alike(a, b):
    if _NUMBER.sub("#", a) != _NUMBER.sub("#", b):
        return False
    return all(
        abs(float(x) - float(y)) <= 1.001 * 10.0 ** -len(x.partition(".")[2])
        for x, y in zip(_NUMBER.findall(a), _NUMBER.findall(b), strict=True)
    )
