"""Parquet files of the datasets on Hugging Face: a row is a record, an image is {"bytes": ..., "path": ...}.

Numbers of a ClassLabel column become the names that the file's metadata has for them.
"""

import json
from collections.abc import Iterator

from tandem.data.formats.containers.base import Container, Found
from tandem.data.formats.containers.lines import pyarrow_for

_ROWS = 16  # read together
_UNIT_BYTES = 1 << 28  # of a unit, by the file's own count
_BUFFER = 1 << 20


class ParquetContainer(Container):
    name = "parquet"
    endings = (".parquet",)

    def units(self, path: str, most: int) -> Iterator[dict]:
        metadata, first = _opened(path).metadata, 0
        pieces: list[list[int]] = []
        rows = weight = 0
        for group in range(metadata.num_row_groups):
            count, size = metadata.row_group(group).num_rows, metadata.row_group(group).total_byte_size
            each = max(1, min(most, count * _UNIT_BYTES // max(size, 1)))
            for skip in range(0, count, each):
                here = min(each, count - skip)
                if pieces and (rows + here > most or weight + size * here // count > _UNIT_BYTES):
                    yield {"first": first, "pieces": pieces, "weight": weight}
                    first, pieces, rows, weight = first + rows, [], 0, 0
                pieces.append([group, skip, here])
                rows, weight = rows + here, weight + size * here // count
        if pieces:
            yield {"first": first, "pieces": pieces, "weight": weight}

    def records(self, path: str, unit: dict, start: int) -> Iterator[Found]:
        file, ordinal = _opened(path), unit["first"]
        labels = _labels(file)
        for group, skip, count in unit["pieces"]:
            row = 0
            for batch in file.iter_batches(batch_size=_ROWS, row_groups=[group]):
                first, last = max(skip - row, 0), min(skip + count - row, batch.num_rows)
                row += batch.num_rows
                if first < last:
                    passed = min(max(start - ordinal, 0), last - first)
                    wanted = batch.slice(first + passed, last - first - passed)
                    for number, record in enumerate(wanted.to_pylist(), ordinal + passed):
                        yield number, record | _named(record, labels)
                    ordinal += last - first
                if row >= skip + count:
                    break


def _opened(path: str):
    pyarrow_for(path)
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a whole parquet file: {error}") from error


def _labels(file) -> dict[str, list[str]]:
    """Names of classes, by column."""
    try:
        features = json.loads((file.schema_arrow.metadata or {})[b"huggingface"])["info"]["features"]
        return {
            column: feature["names"]
            for column, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and "names" in feature
        }
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _named(record: dict, labels: dict[str, list[str]]) -> dict:
    numbers = {column: record[column] for column in labels if isinstance(record.get(column), int)}
    return {column: labels[column][n] for column, n in numbers.items() if 0 <= n < len(labels[column])}


CONTAINER = ParquetContainer()
