"""InternLM's published scaling of its 7B model beside what a model of it predicts: python -m benchmarks.scaling.

The table is InternLM's (doc/en/train_performance.md, v0.2.1): tokens per GPU and second on A100 80GB, eight to a
node with 4 x 100 Gb/s, 4 micro-batches of 2 x 2,048 tokens (tp=1) or 4 x 2,048 (tp=2) a step.

What is predicted: a step's products, memory traffic and tensor-parallel messages are read off a dry run of this
project's engine and timed by `dry_run=a100`. InternLM's own communication is added: it reduces gradients once a step
behind the last backward pass, and then every one of its z optimizer partitions broadcasts its parameters in turn.

What is calibrated, on three of the 32 published numbers (marked *): the share of a GPU's peak that products reach, the
reduction's latency a rank, and the latency of one partition's broadcast. The other 29 are predictions.
"""

from dataclasses import dataclass

from hydra import compose, initialize_config_dir

import train
from conf.command import CONF
from conf.schema import TrainConfig, register, to_config

N_GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
PUBLISHED = {  # (tp, zero1): tokens per GPU and second
    (1, -1): (4062, 3842, 3752, 3690, 3571, 3209, 2861, 2271),
    (1, 8): (4078, 3939, 3919, 3944, 3928, 3920, 3835, 3625),
    (2, -1): (3822, 3595, 3475, 3438, 3308, 3094, 2992, 2785),
    (2, 4): (3761, 3658, 3655, 3650, 3651, 3653, 3589, 3486),
}
CALIBRATED = {(1, 8, 8), (1, 8, 1024), (1, -1, 1024)}
TOKENS = 16_384  # a GPU and step
GRADIENT_BYTES, BUCKET = 2 * 7_321_948_160, 2 * 512 * 1024**2  # bf16, and InternLM's reduce_bucket_size


@dataclass(frozen=True, slots=True)
class InternLM:
    """Seconds that InternLM v0.2.1 adds to computing, by the two latencies that are calibrated."""

    reduce_s: float  # a bucket's all-reduce, for each rank that takes part
    broadcast_s: float  # of one optimizer partition's parameters

    def added_s(self, n_gpus: int, tp: int, zero1: int, backward_s: float, config: DryRunConfig) -> float:
        ranks = n_gpus // tp
        buckets = -(-GRADIENT_BYTES // tp // BUCKET)
        within = n_gpus <= config.devices_per_node
        gbps = config.intra_node_gbps if within else config.inter_node_gbps * config.devices_per_node / tp
        reduction_s = 2 * (ranks - 1) / ranks * GRADIENT_BYTES / tp / (gbps * 1e9)
        exposed_s = max(0.0, reduction_s - config.overlap * backward_s)
        partitions = ranks if zero1 < 0 else zero1
        return exposed_s + buckets * ranks * self.reduce_s + partitions * self.broadcast_s


