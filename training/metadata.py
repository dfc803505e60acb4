"""Metadata of torch.distributed.checkpoint, unpickled safely."""

import io
import operator
import pickle
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from training.config import CheckpointError, DamagedError
from training.ranks import some

DCP = "torch.distributed.checkpoint"
# The only names that the pickle may import, besides torch dtypes
PICKLED_NAMES = {
    "torch": {"Size", "device"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath"},
    "pathlib._local": {"Path", "PosixPath"},
    f"{DCP}.filesystem": {"_StorageInfo", "StorageMeta"},
    f"{DCP}.metadata": {
        "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
}  # fmt: skip


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):  # how Python 3.11 and 3.12 pickle enum members
            return operator.getitem
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and name not in PICKLED_NAMES.get(module, ()):
            raise pickle.UnpicklingError(f"it imports {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


class MetadataReader(FileSystemReader):
    """A reader that uses the result of `read_metadata`; DCP's own would unpickle anything."""

    def __init__(self, path: Path, metadata: Metadata) -> None:
        super().__init__(path)
        self._metadata = metadata

    def read_metadata(self, *_args: Any, **_kwargs: Any) -> Metadata:
        return self._metadata


def read_metadata(folder: Path) -> Metadata:
    """Read a checkpoint's metadata; raise `DamagedError` if it is damaged or has more than tensors."""
    content = io.BytesIO((folder / ".metadata").read_bytes())
    try:
        metadata = _MetadataUnpickler(content).load()
        if not all(isinstance(entry, TensorStorageMetadata) for entry in metadata.state_dict_metadata.values()):
            raise ValueError("it has more than tensors")
    except Exception as error:  # a pickle can raise anything
        raise DamagedError(f"{folder}/.metadata is damaged: {error}") from None
    return metadata


def check_complete(metadata: Metadata, names: set[str], sizes: dict[str, int]) -> None:
    """Raise unless every element of the named tensors is in a file that is long enough.

    `sizes` are the file sizes on disk. DCP's writer can lose data without an error.
    """
    places: dict[MetadataIndex, Any] = metadata.storage_data or {}
    if missing := names ^ set(metadata.state_dict_metadata):
        raise CheckpointError(f"{some(missing)} were not written")
    for name, entry in metadata.state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata)
        lost = prod(entry.size)
        for chunk in entry.chunks:
            place = places.get(MetadataIndex(name, chunk.offsets))
            if place is not None and sizes.get(place.relative_path, -1) >= place.offset + place.length:
                lost -= prod(chunk.sizes)
        if lost:
            raise CheckpointError(f"{lost:,} elements of {name} were not written")
