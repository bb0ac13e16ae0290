"""The rooms of the package: modules, lines of code, and lines of docstring of each.

    python bench/rooms.py [FOLDER]          # the package's folder; this checkout's by default

A line of code is one that holds a token which is neither a comment nor part of a docstring.
"""

import ast
import sys
import tokenize
from collections import defaultdict
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "voltana_ctrl"
NO_CODE = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
    tokenize.ENCODING, tokenize.ENDMARKER,
}  # fmt: skip


def docstring_lines(path):
    """Numbers of the lines of all docstrings of a module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            first = node.body[0]
            found |= set(range(first.lineno, first.end_lineno + 1))
    return found


def code_lines(path, docstrings):
    """Numbers of the lines of a module that hold code."""
    found = set()
    with tokenize.open(path) as stream:
        for token in tokenize.generate_tokens(stream.readline):
            if token.type not in NO_CODE:
                found |= set(range(token.start[0], token.end[0] + 1))
    return found - docstrings


def main():
    package = Path(sys.argv[1]) if len(sys.argv) > 1 else PACKAGE
    rooms = defaultdict(lambda: [0, 0, 0, 0])
    for path in sorted(package.rglob("*.py")):
        room = rooms[path.relative_to(package).parts[0].removesuffix(".py")]
        docstrings = docstring_lines(path)
        code = len(code_lines(path, docstrings))
        room[0] += 1
        room[1] += code
        room[2] += len(docstrings)
        room[3] = max(room[3], code)
    print("| room | modules | lines of code | largest module | lines of docstring |")
    print("|---|---|---|---|---|")
    for name, (modules, code, docstrings, largest) in sorted(rooms.items()):
        print(f"| `{name}` | {modules} | {code} | {largest} | {docstrings} |")
    sums = [sum(room[k] for room in rooms.values()) for k in range(3)]
    print(f"| all | {sums[0]} | {sums[1]} | | {sums[2]} |")


if __name__ == "__main__":
    main()
