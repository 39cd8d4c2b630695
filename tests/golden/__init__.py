"""Golden values: losses, norms and learning rates of every recipe, and a checkpoint of an earlier version.

    python -m tests.golden                       prints how far this machine's numbers are from losses.json
    python -m tests.golden --record              writes losses.json again
    python -m tests.golden --record-checkpoint   also makes checkpoint/ and digests.json again

Record again only with a change that is meant to change numbers, in the same commit, with the reason in its message.
Record the checkpoint again only when the format changes and old checkpoints are given up.
"""
