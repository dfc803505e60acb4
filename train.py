"""Train a model: python train.py model=7b data=pile_small; see README.md for every group.

Nothing here imports torch before the configuration is known to be right.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from conf.command import run
from conf.schema import TrainConfig, parse_ranges, to_config

if TYPE_CHECKING:
    from parallel.mesh import Mesh


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> float | None:
    config = to_config(cfg)
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    plain: Any = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)

    from parallel.mesh import distributed

    with distributed(config.parallel) as mesh:
        return train(config, plain, mesh, run_dir)


if __name__ == "__main__":
    run(main, "train")
