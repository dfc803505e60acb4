"""Where weights are taken from: what can be said of a path before torch is imported."""

from pathlib import Path

from tracking.run_folder import checkpoints_of
from training.config import CheckpointError


def refuse_no_origin(init_from: Path) -> None:
    """Raise `CheckpointError` if there is nothing to begin from."""
    what = "name a run, a checkpoint, or a Hugging Face folder"
    if not init_from.is_dir():
        raise CheckpointError(f"init_from ({init_from}) is no folder; {what}")
    if not (init_from / "config.json").exists() and not checkpoints_of(init_from):
        raise CheckpointError(f"init_from ({init_from}) holds neither a checkpoint nor a config.json; {what}")


def checkpoints_in(path: Path) -> list[Path]:
    """Give a checkpoint's folder itself, or those of a run folder, newest first; `CheckpointError` if there is none."""
    found = checkpoints_of(path)
    if not found:
        raise CheckpointError(
            f"there is no checkpoint in {path}; name a run folder such as runs/demo, or one of its checkpoints"
        )
    return found
