"""Tables with a line of column names: .csv and .tsv."""

import csv
import json
from pathlib import Path

from tandem.data.formats.containers.base import Container, not_utf8

_LONGEST = 1 << 24  # characters of a cell


class TableContainer(Container):
    name = "table"
    endings = (".csv", ".tsv")

    def prepare(self, path: str, folder: Path, number: int) -> tuple[str, str, str | None]:
        """The table as lines of JSON; names of files are relative to its folder."""
        out = folder / f"table-{number:04}.jsonl"
        csv.field_size_limit(_LONGEST)
        try:
            with open(path, encoding="utf-8-sig", newline="") as file, open(out, "w", encoding="utf-8") as lines:
                rows = csv.DictReader(file, delimiter="\t" if path.lower().endswith(".tsv") else ",")
                for row in rows:
                    lines.write(json.dumps({key: value for key, value in row.items() if key}) + "\n")
        except UnicodeDecodeError as error:
            raise ValueError(not_utf8(path, error.start)) from error
        except csv.Error as error:
            raise ValueError(f"{path} is damaged in line {rows.line_num}: {error}") from error
        return "lines", str(out), str(Path(path).resolve().parent)


CONTAINER = TableContainer()
