"""Tensors of safetensors files as NumPy arrays, bfloat16 included, mapped and not read where that is not asked for.

The format: eight bytes with the length of a JSON header, the header (name -> dtype, shape, data_offsets), the data.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from bhpeft.errors import InputError
from bhpeft.files import read_json

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "U8": "u1", "I8": "i1"}
MOST_HEADER = 100_000_000  # bytes, as the format allows


class TensorFile:
    """One file; `file[name]` is a tensor, floats of 16 bits as float32.

    Raises:
        InputError: no such file, or none of that format.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if not 2 <= length <= MOST_HEADER:
                    raise ValueError("its header has no length")
                header = json.loads(file.read(length))
            size = self.path.stat().st_size
            self._entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            self._start = 8 + length
            if max((entry["data_offsets"][1] for entry in self._entries.values()), default=0) + self._start > size:
                raise ValueError("it is cut short")
            for name, entry in self._entries.items():
                if not _consistent(entry):
                    raise ValueError(f"its header is wrong about {name}")
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read ({error.strerror}); check the folder.") from None
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"{self.path}: no whole safetensors file ({error}); save it again.") from None

    @property
    def names(self) -> list[str]:
        """Names of its tensors, in the file's order."""
        return list(self._entries)

    def shape(self, name: str) -> list[int]:
        """Of the tensor of that name, off the header."""
        return self._entries[name]["shape"]

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self._entries[name]
        if entry["dtype"] not in DTYPES:
            raise InputError(f"{self.path}: {name} has the dtype {entry['dtype']}, which is not read here.")
        dtype, (first, last) = np.dtype(DTYPES[entry["dtype"]]), entry["data_offsets"]
        if first == last:
            return np.zeros(entry["shape"], dtype=np.float32)
        offset = self._start + first
        data = np.memmap(self.path, dtype=dtype, mode="r", offset=offset, shape=((last - first) // dtype.itemsize,))
        values = data.reshape(entry["shape"])
        if entry["dtype"] == "BF16":
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values.astype(np.float32) if entry["dtype"] == "F16" else values


def _consistent(entry: dict) -> bool:
    """Whether a tensor's place in the file is as large as its shape says."""
    shape, (first, last) = entry["shape"], entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, first, last)) or first > last:
        return False
    dtype = DTYPES.get(entry["dtype"])
    return dtype is None or last - first == math.prod(shape) * np.dtype(dtype).itemsize


class TensorFolder:
    """A model's folder: model.safetensors, or the parts its index names.

    Raises:
        InputError: the folder holds neither.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            try:
                self._parts = dict(read_json(index, "fetch the model again.")["weight_map"])
            except (KeyError, TypeError):
                raise InputError(f"{index}: no index of parts; fetch the model again.") from None
        elif (self.folder / "model.safetensors").is_file():
            self._parts = dict.fromkeys(TensorFile(self.folder / "model.safetensors").names, "model.safetensors")
        else:
            raise InputError(f"{folder}: no model.safetensors in it (pickles are not read here); fetch it again.")
        self._files: dict[str, TensorFile] = {}

    @property
    def names(self) -> list[str]:
        """Names of the tensors of all parts."""
        return list(self._parts)

    def check(self) -> None:
        """Raise `InputError` if a part is missing or cut short, by their headers alone."""
        for name in {part: name for name, part in self._parts.items()}.values():
            self._file(name)

    def _file(self, name: str) -> TensorFile:
        part = self._parts[name]
        if part not in self._files:
            self._files[part] = TensorFile(self.folder / part)
        return self._files[part]

    def shape(self, name: str) -> list[int]:
        """Of the tensor of that name, off its part's header."""
        return self._file(name).shape(name)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._file(name)[name]


def check_weights(name: str) -> None:
    """Raise `InputError` if a base model's folder has no whole safetensors files; a hub id is left to the hub."""
    if Path(name).is_dir():
        TensorFolder(name).check()
