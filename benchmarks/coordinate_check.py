"""Coordinate check of parametrizations: python -m benchmarks.coordinate_check [--out docs/images]

Trains models of several widths for ten steps under each parametrization, and plots mean absolute activations over
width, a line per step: of the residual stream, the outputs of attention and MLP, and the logits. Lines should be flat;
others need another learning rate at each width (Yang et al. 2022, arXiv:2203.03466).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from data.mixed_text import mixed_lines
from model.config import Init, ModelConfig, Parametrization
from model.transformer import Transformer
from training.config import MuonScale, OptimizerConfig
from training.optim.optimizer import Optimizer

WIDTHS = (64, 128, 256, 512)
PLACES = {"residual": "blocks.3.mlp_norm", "attention": "blocks.3.attention.wo", "mlp": "blocks.3.mlp", "logits": ""}
RATES = {"adamw": 3e-3, "muon": 1e-2}


def text_tokens(n_rows: int = 4, row_len: int = 64) -> Tensor:
    text = "".join(mixed_lines()).encode()[: n_rows * row_len]
    return torch.tensor(list(text)).view(n_rows, row_len)


def activations(parametrization: Parametrization, optimizer: str, width: int, steps: int) -> dict[str, list[float]]:
    """Return the mean absolute activation at each of `PLACES` before each step and after the last."""
    config = ModelConfig(
        name="check", vocab_size=256, d_model=width, n_layers=4, n_heads=width // 16, n_kv_heads=width // 16,
        d_ff=2 * width, max_seq_len=64, init=Init.llama, parametrization=parametrization, base_width=WIDTHS[0],
    )  # fmt: skip
    model, tokens_BT = Transformer(config), text_tokens()
    model.init_weights(seed=0)
    settings = OptimizerConfig(name=optimizer, lr=RATES[optimizer], scale=MuonScale.spectral)
    update = Optimizer(model, settings)
    update.set_schedule([(settings.lr, settings.beta2)] * steps)
    found: dict[str, list[float]] = {place: [] for place in PLACES}
    for place, path in PLACES.items():

        def record(_module: object, inputs: tuple[Tensor, ...], output: Tensor, place: str = place) -> None:
            found[place].append(float((inputs[0] if place == "residual" else output).detach().abs().mean()))

        model.get_submodule(path).register_forward_hook(record)
    for step in range(steps + 1):
        logits = model(tokens_BT)
        if step < steps:
            F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten()).backward()
            update.step(grad_scale=torch.ones(()), finite=torch.tensor(True))
    return found


def plot(optimizer: str, widths: Sequence[int], steps: int, path: Path) -> None:
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    kinds, figure = list(Parametrization), Figure(figsize=(11, 7), dpi=110, layout="constrained")
    axes = figure.subplots(len(kinds), len(PLACES), sharex=True, sharey="col")
    for row, kind in zip(axes, kinds, strict=True):
        found = [activations(kind, optimizer, width, steps) for width in widths]
        for axis, place in zip(row, PLACES, strict=True):
            for step in range(steps + 1):
                color, sizes = colormaps["viridis"](step / steps), [means[place][step] for means in found]
                axis.loglog(widths, sizes, color=color, marker=".", base=2)
            axis.set_title(f"{place}, {kind.value}", fontsize=9)
            change = found[-1][place][-1] / found[0][place][-1]
            print(f"{optimizer:6} {kind.value:10} {place:10} x {change:.2f} from width {widths[0]} to {widths[-1]}")
    figure.supxlabel("d_model")
    figure.suptitle(f"{optimizer}: mean absolute activation, steps 0 (dark) to {steps} (light)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--steps", type=int, default=10)
    arguments = parser.parse_args()
    for optimizer in RATES:
        plot(optimizer, arguments.widths, arguments.steps, arguments.out / f"coordinate_check_{optimizer}.png")


if __name__ == "__main__":
    main()
