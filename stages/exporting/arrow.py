"""A `datasets` folder: `datasets.load_from_disk(OUT)`, or `Dataset.from_file` on its .arrow file.

One record a row, with the columns `activations` (a list of d_in floats) and `source`. The rows of a
store are shuffled, so the contexts that SAELens' own cache has as records cannot be given back.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ...storage.values import Rows
from .base import ACTIVATIONS, SOURCE, Exporter

_DATA = "data-00000-of-00001.arrow"


class ArrowExport(Exporter):
    """An Arrow stream file, and the two JSON files that `datasets` looks for beside it."""

    about = "a folder for datasets.load_from_disk, one record a row"
    number_formats = ("float32", "float16")
    missing = {"bfloat16": "Arrow has no bfloat16"}  # noqa: RUF012 - never changed

    def __init__(
        self, folder: Path, shape: tuple[int, int], number_format: str, notes: dict[str, str]
    ) -> None:
        value = {"float32": pa.float32(), "float16": pa.float16()}[number_format]
        self._type = pa.list_(value, shape[1])
        of_value = {"dtype": number_format, "_type": "Value"}
        features = {
            ACTIVATIONS: {"feature": of_value, "length": shape[1], "_type": "Sequence"},
            SOURCE: {"dtype": "int64", "_type": "Value"},
        }
        metadata = {"huggingface": json.dumps({"info": {"features": features}}), **notes}
        fields = [(ACTIVATIONS, self._type), (SOURCE, pa.int64())]
        self._schema = pa.schema(fields, metadata=metadata)
        info = {"citation": "", "description": "", "features": features}
        (folder / "dataset_info.json").write_text(
            json.dumps(info | {"homepage": "", "license": ""})
        )
        state: dict[str, Any] = {
            "_data_files": [{"filename": _DATA}],
            "_fingerprint": notes["digest"][:16],
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": None,
        }
        (folder / "state.json").write_text(json.dumps(state))
        self._file = (folder / _DATA).open("wb")
        self._writer = pa.ipc.new_stream(self._file, self._schema)

    def write(self, rows_RD: Rows, source_R: NDArray[np.int64]) -> None:
        values = pa.array(rows_RD.reshape(-1), type=self._type.value_type)
        lists = pa.FixedSizeListArray.from_arrays(values, type=self._type)
        self._writer.write_batch(pa.record_batch([lists, pa.array(source_R)], schema=self._schema))

    def close(self) -> None:
        if not self._file.closed:
            self._writer.close()
            self._file.close()
