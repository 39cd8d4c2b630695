"""`python -m tests.golden`: see tests/golden/__init__.py."""

import argparse
import os
import shutil
import tempfile
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # golden values are the CPU's, as all tests' are

from tandem.train.checkpoints import checkpoint
from tests.distributed.world import run_world
from tests.golden import __doc__ as usage
from tests.golden import compare, runs
from tests.golden.corpus import make_corpus


def main() -> None:
    parser = argparse.ArgumentParser(description=usage, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="write losses.json")
    parser.add_argument("--record-checkpoint", action="store_true", help="write checkpoint/, digests.json, losses.json")
    arguments = parser.parse_args()
    whole = save_checkpoint() if arguments.record_checkpoint else None
    fingerprint, found = {}, {}
    for ranks in runs.WORLDS:
        with tempfile.TemporaryDirectory() as folder:
            fingerprint, numbers = runs.numbers_of_world(ranks, Path(folder))
        found |= numbers
    assert whole in (None, found["resumed"]), "the run that resumed differs from the run that was not interrupted"
    if arguments.record or arguments.record_checkpoint:
        compare.write(compare.LOSSES, {"recorded_by": fingerprint, "runs": found})
    recorded_by, golden = compare.golden()
    print(f"here      {fingerprint}\nrecorded  {recorded_by}\n")
    kinds = ("loss", "grad_norm", "saved")
    print(f"{'largest relative difference':28s}" + "".join(f"{kind:>12s}" for kind in kinds))
    for name, numbers in golden.items():
        worst = [compare.worst(found[name], numbers, kind) for kind in kinds]
        print(f"{name:28s}" + "".join(f"{value:12.1e}" for value in worst))


def save_checkpoint() -> compare.Numbers:
    """Makes the stored checkpoint; returns the numbers of the run that wrote it, of the steps after the checkpoint."""
    shutil.rmtree(runs.CHECKPOINT, ignore_errors=True)
    with tempfile.TemporaryDirectory() as name:
        folder, run = Path(name), runs.SAVING
        make_corpus(folder)
        [(_, made)] = run_world(runs.train_all, 1, [run], name)
        saved = Path("checkpoints") / f"step-{runs.SAVED_STEP:08d}"
        shutil.copytree(folder / run.name / saved, runs.CHECKPOINT / saved)
        shutil.copy(folder / run.name / "config.yaml", runs.CHECKPOINT)
    compare.write(compare.DIGESTS, compare.digests(checkpoint.resolve(runs.CHECKPOINT)))
    return made[run.name] | {"steps": made[run.name]["steps"][runs.SAVED_STEP :]}


if __name__ == "__main__":
    main()
