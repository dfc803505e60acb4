"""DCP's metadata, which tensor lies in which file, read without running what a pickle could run."""

import pickle
from enum import Enum
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from training.config import CheckpointError, DamagedError
from training.ranks import some

DCP = "torch.distributed.checkpoint"
# The only names that the pickle may bring to life, beside torch's dtypes
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
        if (module, name) == ("builtins", "getattr"):
            return _enum_member  # Python 3.11 and 3.12 pickle a member of an enum so
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and name not in PICKLED_NAMES.get(module, ()):
            raise DamagedError(f".metadata asks for {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


def _enum_member(owner: Any, name: str) -> Any:
    if not (isinstance(owner, type) and issubclass(owner, Enum)):
        raise DamagedError(f".metadata asks for {name} of {owner}, which no checkpoint needs")
    return owner[name]


class MetadataReader(FileSystemReader):
    """Reads tensors by metadata that `read_metadata` returned: DCP's own reader would unpickle anything."""

    def __init__(self, path: Path, metadata: Metadata) -> None:
        super().__init__(path)
        self._metadata = metadata

    def read_metadata(self, *_args: Any, **_kwargs: Any) -> Metadata:
        return self._metadata


def read_metadata(folder: Path) -> Metadata:
    """Read which tensors a checkpoint holds; raises `DamagedError` if it is damaged or holds anything else."""
    with (folder / ".metadata").open("rb") as file:
        try:
            metadata = _MetadataUnpickler(file).load()
        except DamagedError as error:
            raise DamagedError(f"{folder}: {error}") from None
        except (pickle.UnpicklingError, EOFError, AttributeError, ValueError) as error:
            raise DamagedError(f"{folder}/.metadata is damaged: {error}") from None
    entries = metadata.state_dict_metadata.values() if isinstance(metadata, Metadata) else [metadata]
    if not all(isinstance(entry, TensorStorageMetadata) for entry in entries):
        raise DamagedError(f"{folder}/.metadata holds more than tensors; it is not loaded")
    return metadata


def check_complete(metadata: Metadata, names: set[str], sizes: dict[str, int]) -> None:
    """Raise unless every number of the named tensors lies in a file that is long enough.

    `sizes` are the bytes of the files as they are on disk. A writer can lose what it was given without an error.
    """
    if missing := names ^ set(metadata.state_dict_metadata):
        raise CheckpointError(f"{some(missing)} were not written")
    for name, entry in metadata.state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata)
        written = sum(prod(chunk.sizes) for chunk in entry.chunks)
        for chunk in entry.chunks:
            place = (metadata.storage_data or {}).get(MetadataIndex(name, chunk.offsets))
            if place is None or sizes.get(place.relative_path, -1) < place.offset + place.length:
                written -= prod(chunk.sizes)
        if written != prod(entry.size):
            raise CheckpointError(f"{prod(entry.size) - written:,} numbers of {name} were not written")
