"""Commands, one a file: each parses arguments, calls the floors below and prints. `main`, here, is the console script
for all of them: `tandem train +recipe=stage1 ...` is `python launch/pretrain.py +recipe=stage1 ...`.

    tandem                     lists the commands
    tandem evaluate --help     what one of them takes

On several ranks:  torchrun --nproc-per-node 8 -m tandem.launch.pretrain +recipe=stage2 ...
"""

import ast
import difflib
import importlib
import re
import sys
from pathlib import Path

MODULES = {"train": "pretrain"}  # a command's module where its name is another; else `make-shards` is make_shards


def main() -> None:
    """Runs the command that the first word names, with the words behind it."""
    word = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if word in ("--help", "-h"):
        print("usage: tandem COMMAND [arguments]\n\ncommands:")
        for name, purpose in commands().items():
            print(f"  {name:16} {purpose}")
        return
    if word not in commands():
        near = difflib.get_close_matches(word, commands(), n=1)
        hint = f"did you mean {near[0]}?" if near else "see tandem --help"
        sys.exit(f"error: there is no command {word}; {hint}")
    # by its own name, not as __main__: processes that a command starts import its functions by that
    module = importlib.import_module(f"tandem.launch.{MODULES.get(word, word.replace('-', '_'))}")
    sys.argv = [f"tandem {word}", *sys.argv[2:]]
    sys.exit(module.main())


def commands() -> dict[str, str]:
    """Name of every command, and how the docstring of its module begins."""
    named = {module: name for name, module in MODULES.items()}
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.stem != "__init__":
            text = ast.get_docstring(ast.parse(path.read_text())) or ""
            sentence = re.split(r"[.:,](?:\s|$)", " ".join(text.split()))[0]
            found[named.get(path.stem, path.stem.replace("_", "-"))] = sentence
    return dict(sorted(found.items()))
