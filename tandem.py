"""The name under which the folders are imported: tandem.train, tandem.parallel, tandem.data and tandem.launch.

In a checkout they lie beside this file, in an installation below it.
"""

from pathlib import Path

_here = Path(__file__).resolve().parent
__path__ = [str(_here / "tandem" if (_here / "tandem" / "train").is_dir() else _here)]

if __name__ == "__main__":
    from tandem.launch import main

    main()
