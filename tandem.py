"""The name under which the folders are imported: tandem.train, tandem.parallel, tandem.data and tandem.launch.

In a checkout they lie beside this file, in an installation below it.
"""

from pathlib import Path

_here = Path(__file__).resolve().parent
__path__ = [str(_here if (_here / "train").is_dir() else _here / "tandem")]
