"""What a checkpoint's tensors are and in which file each part lies; read without running what a pickle could run."""

import pickle
from enum import Enum
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from training.config import CheckpointError
from training.ranks import some

# DCP's metadata is a pickle; these are the only names it may bring to life.
METADATA = "torch.distributed.checkpoint.metadata"
PICKLED_NAMES = {
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.filesystem", "StorageMeta"),
    *(
        (METADATA, name)
        for name in (
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _enum_member  # Python 3.11 and 3.12 pickle a member of an enum so
        allowed = (module, name) in PICKLED_NAMES
        allowed = allowed or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype))
        allowed = allowed or (module.startswith("pathlib") and name in ("Path", "PosixPath"))
        if not allowed:
            raise CheckpointError(
                f"its .metadata asks for {module}.{name}, which no checkpoint needs; it is not loaded"
            )
        return super().find_class(module, name)


def _enum_member(owner: Any, name: str) -> Any:
    if not (isinstance(owner, type) and issubclass(owner, Enum)):
        raise CheckpointError(f"its .metadata asks for {name} of {owner}, which no checkpoint needs; it is not loaded")
    return owner[name]


class MetadataReader(FileSystemReader):
    """Reads tensors by metadata that was read before: DCP's own way would run what a pickle could run."""

    def __init__(self, path: Path, metadata: Metadata) -> None:
        super().__init__(path)
        self._metadata = metadata

    def read_metadata(self, *_args: Any, **_kwargs: Any) -> Metadata:
        return self._metadata


def read_metadata(folder: Path) -> Metadata:
    """Read which tensors a checkpoint holds; raises `CheckpointError` if it is damaged or holds anything else."""
    with (folder / ".metadata").open("rb") as file:
        try:
            metadata = _MetadataUnpickler(file).load()
        except CheckpointError as error:
            raise CheckpointError(f"{folder}: {error}") from None
        except (pickle.UnpicklingError, EOFError, AttributeError, ValueError) as error:
            raise CheckpointError(f"{folder}/.metadata is damaged: {error}") from None
    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"{folder}/.metadata is no metadata")
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(f"{folder}: {name} is not a tensor, and is not loaded")
    return metadata


def check_complete(metadata: Metadata, names: set[str], sizes: dict[str, int]) -> None:
    """Raise unless every number of the named tensors lies in a file that is long enough.

    `sizes` are the bytes of the files as they are on disk. A writer can lose what it was given and say nothing.
    """
    if set(metadata.state_dict_metadata) != names:
        raise CheckpointError(f"{some(names - set(metadata.state_dict_metadata))} were not written")
    for name, entry in metadata.state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata)
        if sum(prod(chunk.sizes) for chunk in entry.chunks) != prod(entry.size):
            raise CheckpointError(f"parts of {name} were not written")
        for chunk in entry.chunks:
            place = (metadata.storage_data or {}).get(MetadataIndex(name, chunk.offsets))
            if place is None or sizes.get(place.relative_path, -1) < place.offset + place.length:
                raise CheckpointError(f"the part of {name} at {tuple(chunk.offsets)} was not written")
