"""Make the tables of the validation pages anew, in place.

python -m bench.validation            # all pages, some minutes
python -m bench.validation l20        # one of them
"""

import importlib
import sys
from pathlib import Path

from bench.validation.page import tables_of, with_tables

PAGES = Path(__file__).resolve().parents[2] / "docs" / "validation"


def main():
    for path in sorted(PAGES.glob("*.md")):
        text = path.read_text(encoding="utf-8")
        if tables_of(text) and path.stem in (sys.argv[1:] or [path.stem]):
            made = importlib.import_module(f"bench.validation.{path.stem}").tables()
            path.write_text(with_tables(text, made), encoding="utf-8")
            print(path.name, *made)


if __name__ == "__main__":
    main()
