"""Finds the expression of a mutation in the tree and changes it.

    Mutation(function="Score.numbers", old="self.loss / max(self.tokens, 1)", ...)
        -> train/evaluation/answers.py, with that expression replaced inside that method

A mutation names a function by its qualified name and an expression by its text, so it survives a change of lines.  The
file is a hint: where it does not hold the expression any more, every source file is searched for the function.
"""

import ast
import re
from dataclasses import dataclass
from pathlib import Path

FLOORS = ("data", "launch", "parallel", "train")


@dataclass(frozen=True)
class Mutation:
    """One change of one expression, and the tests that are meant to fail with it.

    file: where the function was when the mutation was written.  function: qualified name of a function, method or
    class; "" for the module.  old, new: the expression and its replacement; a run of white space in `old` matches any
    other.  tests: pytest files or node ids.  select: a `-k` expression, or "".  survives: the reason why no test can
    be expected to catch it; "" for a mutation that must be caught.
    """

    name: str
    file: str
    function: str
    old: str
    new: str
    tests: tuple[str, ...]
    select: str = ""
    survives: str = ""


class NotFoundError(ValueError):
    """A mutation does not fit the tree; the message is one sentence."""


def apply(mutation: Mutation, root: Path) -> tuple[Path, str]:
    """(file to change, its text with the mutation).  Raises NotFoundError unless the expression is there just once."""
    path, begin, end = find(mutation, root)
    text = path.read_text()
    changed = text[:begin] + mutation.new + text[end:]
    try:
        same = ast.dump(ast.parse(changed)) == ast.dump(ast.parse(text))
    except SyntaxError as error:
        raise NotFoundError(f"{mutation.name}: {mutation.new!r} does not compile in {path.name}: {error}") from error
    if same:
        raise NotFoundError(f"{mutation.name}: {mutation.new!r} means the same as {mutation.old!r}")
    return path, changed


def find(mutation: Mutation, root: Path) -> tuple[Path, int, int]:
    """(file, begin, end) of the expression, in characters.  Raises NotFoundError unless it is there just once."""
    hint = root / mutation.file
    found = _places(mutation, hint) if hint.is_file() else []
    if not found:
        others = [path for floor in FLOORS for path in sorted((root / floor).rglob("*.py")) if path != hint]
        found = [place for path in others for place in _places(mutation, path)]
    if len(found) != 1:
        raise NotFoundError(
            f"{mutation.name}: {mutation.old!r} is {len(found)} times in {mutation.function or 'the module'} of "
            f"{mutation.file} or of the files that have it now; must be there once"
        )
    return found[0]


def _places(mutation: Mutation, path: Path) -> list[tuple[Path, int, int]]:
    text = path.read_text()
    if mutation.function.rpartition(".")[2] not in text:
        return []
    pattern = re.compile(r"\s+".join(map(re.escape, mutation.old.split())))
    return [
        (path, match.start(), match.end())
        for begin, end in _spans(text, mutation.function)
        for match in pattern.finditer(text, begin, end)
    ]


def _spans(text: str, function: str) -> list[tuple[int, int]]:
    """Begin and end, in characters, of every definition of this qualified name; decorators are left out."""
    nodes: list[ast.AST] = [ast.parse(text)]
    for word in filter(None, function.split(".")):
        nodes = [
            child
            for node in nodes
            for child in getattr(node, "body", [])
            if isinstance(child, ast.FunctionDef | ast.ClassDef) and child.name == word
        ]
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    return [(starts[node.lineno - 1], starts[node.end_lineno]) if function else (0, len(text)) for node in nodes]
