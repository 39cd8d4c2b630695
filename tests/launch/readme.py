"""Runs the commands of the README as they stand, in a copy of the tree, with toy data for a cluster's:

    python -m tests.launch.readme

Left out, with the reason printed: what other programs run (`make test`), what takes a cluster (`sbatch`), and of the
longer `make` targets all but the one that the date draws.  The exit status is 0 only if every command that ran gave 0.
"""

import datetime
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.mutants.run import Copy
from tests.support import ROOT

LONG = ("make learn", "make hf", "make vit_mim", "make vit_contrastive", "make vit_omni")
LEFT_OUT = {"make test": "runs by itself", "sbatch": "takes SLURM; tests/launch/test_slurm.py runs the template"}
TOY = {
    "/data/train-{0000..0099}.tar": "shards/toy/train/*.tar",
    "raw/{0000..0099}.tar": "shards/toy/train/*.tar",
    "/data/tokenizer.json": "shards/toy/tokenizer.json",
    "model.llm.vocab_size=32768": "model.llm.vocab_size=384",
    "+recipe=": "train.steps=2 +recipe=",
    "benchmarks/hybrid_step.py": "benchmarks/hybrid_step.py --size toy",
}
NOT_TRAINED = ("launch/inspect_data.py",)  # takes settings, but no steps


def lines() -> list[str]:
    """Command lines of the README's sh blocks, continued lines joined and comments cut."""
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    joined = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].split(" # ")[0].strip() for line in joined if shlex.split(line, comments=True)]


def reason(line: str, day: datetime.date) -> str | None:
    """Why a command is left out; None if it runs."""
    drawn = LONG[day.toordinal() % len(LONG)]
    if line in LONG and line != drawn:
        return f"the date draws {drawn}"
    return next((why for begin, why in LEFT_OUT.items() if line.startswith(begin)), None)


def on_toy_data(line: str) -> str:
    for theirs, ours in TOY.items():
        if not (ours.startswith("train.steps") and any(command in line for command in NOT_TRAINED)):
            line = line.replace(theirs, ours)
    return line


def main() -> int:
    day, failed = datetime.date.today(), []
    with tempfile.TemporaryDirectory(prefix="readme-") as folder:
        tree = Copy(ROOT, Path(folder) / "tree")
        (tree.folder / ".venv").symlink_to(Path(sys.prefix))
        environment = tree.environment | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        for line in [*lines(), LONG[0]]:
            if why := reason(line, day):
                print(f"left out: {line[:80]}: {why}", flush=True)
                continue
            begin, command = time.monotonic(), on_toy_data(line)
            done = subprocess.run(
                ["bash", "-c", command], cwd=tree.folder, env=environment, capture_output=True, text=True
            )
            print(
                f"{'ok' if done.returncode == 0 else 'FAILED'} {time.monotonic() - begin:6.1f} s  {command}", flush=True
            )
            if done.returncode:
                failed.append(command)
                print("\n".join((done.stdout + done.stderr).splitlines()[-15:]), flush=True)
    print(f"{len(failed)} commands of the README failed")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
