"""Writes the tables of README.md and docs/ from the results in benchmarks/results/.

    python benchmarks/tables.py            writes them
    python benchmarks/tables.py --check    changes nothing; exits with 1 where a page and the results differ

A page holds one block per result, which this program owns:

    <!-- benchmarks/results/experts.json -->
    (the table that benchmarks/experts.py prints, and a line with date, machine and command)
    <!-- end -->
"""

import argparse
import importlib
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before this folder, whose data.py is not the package

from benchmarks import results
from benchmarks.results import ROOT

BLOCK = re.compile(r"<!-- benchmarks/results/([\w-]+)\.json -->\n.*?<!-- end -->", re.DOTALL)
NOT_ON_A_GPU = "A whole run on a GPU has not been made yet, so no table stands here."
MAY_BE_MISSING = {"gpu": f"**{NOT_ON_A_GPU}**", "encoder-full": NOT_ON_A_GPU, "mim_readings-full": NOT_ON_A_GPU}


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def content(name: str) -> str:
    """Markdown of a block.  Raises ValueError where a result is missing that needs no GPU."""
    path = results.FOLDER / f"{name}.json"
    if not path.is_file():
        if name in MAY_BE_MISSING:
            return MAY_BE_MISSING[name]
        raise ValueError(f"{path.relative_to(ROOT)} is missing: run python benchmarks/{results.script(name)}.py")
    result = results.read(path)
    table = importlib.import_module(f"benchmarks.{results.script(name)}").table(result)
    return f"```\n{table}\n```\n\n{results.provenance(result)}"


def written(text: str) -> str:
    """A page's text with all blocks made anew.  Raises ValueError for markers that do not pair up."""
    found = list(BLOCK.finditer(text))
    if not len(found) == text.count("<!-- benchmarks/results/") == text.count("<!-- end -->"):
        raise ValueError("each <!-- benchmarks/results/NAME.json --> needs one <!-- end --> behind it")
    for block in found:
        text = text.replace(block[0], f"<!-- benchmarks/results/{block[1]}.json -->\n{content(block[1])}\n<!-- end -->")
    return text


def differences() -> dict[Path, str]:
    """New text of every page whose blocks are not those of the results."""
    changed = {}
    for page in pages():
        try:
            text = written(page.read_text())
        except ValueError as error:
            raise ValueError(f"{page.relative_to(ROOT)}: {error}") from error
        if text != page.read_text():
            changed[page] = text
    return changed


def unused() -> set[str]:
    """Results that no page shows."""
    shown = {block[1] for page in pages() for block in BLOCK.finditer(page.read_text())}
    return {path.stem for path in results.FOLDER.glob("*.json")} - shown


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 where they differ")
    options = parser.parse_args(argv)
    try:
        changed = differences()
    except ValueError as error:
        sys.exit(f"error: {error}")
    if names := sorted(unused()):
        sys.exit(f"error: no page shows benchmarks/results/ {', '.join(names)}")
    if options.check and changed:
        names = ", ".join(str(page.relative_to(ROOT)) for page in changed)
        sys.exit(f"error: {names}: not the tables of benchmarks/results; python benchmarks/tables.py writes them")
    for page, text in changed.items():
        page.write_text(text)
        print(f"{page.relative_to(ROOT)} written")


if __name__ == "__main__":
    main()
