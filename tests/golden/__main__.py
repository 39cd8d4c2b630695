"""`python -m tests.golden`: see tests/golden/__init__.py."""

import argparse
import os
import shutil
import tempfile
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # golden values are the CPU's, as all tests' are

from tests.distributed.world import run_world
from tests.golden import __doc__ as usage
from tests.golden import compare, runs
from tests.golden.corpus import make_corpus
from train import checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=usage, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="write losses.json")
    parser.add_argument("--record-checkpoint", action="store_true", help="write checkpoint/, digests.json, losses.json")
    arguments = parser.parse_args()
    lines = save_checkpoint() if arguments.record_checkpoint else None
    fingerprint, found = {}, {}
    for ranks in runs.WORLDS:
        with tempfile.TemporaryDirectory() as folder:
            fingerprint, numbers = runs.numbers_of_world(ranks, Path(folder))
        found |= numbers
    assert lines in (None, found["resumed"]), "the run that resumed differs from the run that was not interrupted"
    if arguments.record or arguments.record_checkpoint:
        compare.write(compare.LOSSES, {"recorded_by": fingerprint, "runs": found})
    recorded_by, golden = compare.golden()
    print(f"here      {fingerprint}\nrecorded  {recorded_by}\n")
    print(f"{'largest relative difference':30s} {'of a loss':>12s} {'of a norm':>12s}")
    for name, lines in golden.items():
        worst = [compare.worst(found[name], lines, prefix) for prefix in ("loss", "grad_norm")]
        print("{:30s} {:12.1e} {:12.1e}".format(name, *worst))


def save_checkpoint() -> list[dict]:
    """Makes the stored checkpoint; returns the numbers of the steps after it, from the run that wrote it."""
    shutil.rmtree(runs.CHECKPOINT, ignore_errors=True)
    with tempfile.TemporaryDirectory() as name:
        folder, run = Path(name), runs.SAVING
        make_corpus(folder)
        run_world(runs.train_all, 1, [run], name)
        saved = Path("checkpoints") / f"step-{runs.SAVED_STEP:08d}"
        shutil.copytree(folder / run.name / saved, runs.CHECKPOINT / saved)
        shutil.copy(folder / run.name / "config.yaml", runs.CHECKPOINT)
        lines = runs.numbers_of_run(folder / run.name)
    compare.write(compare.DIGESTS, compare.digests(checkpoint.resolve(runs.CHECKPOINT)))
    return lines[runs.SAVED_STEP :]


if __name__ == "__main__":
    main()
