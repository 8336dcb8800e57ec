"""Draw the pictures of docs/loss.md: python scripts/loss_figures.py

What each term sees (points moved by its gradient), and the divergence against the bandwidth. Everything is seeded; a
minute on one core.
"""

from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from torch import Tensor

from csdiff.losses import cauchy_schwarz_divergence, info_nce, squared_mmd

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLOURS = {"target": "#b0b7bf", "blue": "#1f6fb4", "red": "#c8442b", "green": "#2e8b57", "ink": "#22272e"}


def two_moons(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Points of two moons `(count, 2)` and their place along them, 0 to 1."""
    place = torch.rand(count, generator=generator)
    upper = torch.arange(count) % 2 == 0
    angle = torch.pi * place
    x = torch.where(upper, angle.cos(), 1 - angle.cos())
    y = torch.where(upper, angle.sin(), 0.5 - angle.sin())
    points = torch.stack([x, y], dim=1) + 0.05 * torch.randn(count, 2, generator=generator)
    return points, torch.where(upper, place / 2, 0.5 + place / 2)


def pair_contrast(x: Tensor, y: Tensor, temperature: float = 0.3) -> Tensor:
    """InfoNCE with logits `-||x - y||^2 / 2` over the temperature, as products of lengthened rows."""
    ones = torch.ones(len(x), 1)
    left = torch.cat([x, -x.square().sum(1, keepdim=True) / 2, ones], dim=1)
    right = torch.cat([y, ones, -y.square().sum(1, keepdim=True) / 2], dim=1)
    return info_nce(left, right, temperature=temperature, two_sided=False)


def flow(loss, start: Tensor, steps: int = 500, rate: float = 0.05) -> Tensor:
    """Where points end that follow the gradient of a loss of them; Adam, so that losses of any scale move alike."""
    x = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(x).backward()
        optimizer.step()
        schedule.step()
    return x.detach()


def draw_flow(path: Path) -> None:
    """Four losses move a misplaced, misshapen copy onto two moons; colour tells which point is whose partner."""
    generator = torch.Generator().manual_seed(0)
    target, place = two_moons(160, generator)
    start = 0.35 * torch.randn(160, 2, generator=generator) + torch.tensor([-1.6, -1.3])
    start = start + 0.25 * (target - target.mean(0))
    # Pairs as captions are: most say where their image is, roughly.
    partner = target + 0.35 * torch.randn(160, 2, generator=generator)
    bandwidth = 0.3
    losses = {
        "InfoNCE": lambda x: pair_contrast(x, partner),
        "Cauchy-Schwarz": lambda x: cauchy_schwarz_divergence(x, target, bandwidth=(bandwidth, 1.0)),
        "MMD": lambda x: squared_mmd(x, target, bandwidth=bandwidth),
        "InfoNCE + Cauchy-Schwarz": lambda x: (
            pair_contrast(x, partner) + 2 * cauchy_schwarz_divergence(x, target, bandwidth=(bandwidth, 1.0))
        ),
    }
    panels = {"before": start, **{name: flow(loss, start) for name, loss in losses.items()}}
    figure, axes = plt.subplots(1, 5, figsize=(16, 3.4), sharex=True, sharey=True)
    for axis, (name, points) in zip(axes, panels.items(), strict=True):
        axis.scatter(*target.T, s=9, color=COLOURS["target"], label="images", linewidths=0)
        axis.scatter(*points.T, s=9, c=place, cmap="turbo", linewidths=0)
        gap = cauchy_schwarz_divergence(points, target, bandwidth=bandwidth).item()
        distance = (points - target).norm(dim=1).mean().item()
        axis.set_title(name, fontsize=11, color=COLOURS["ink"])
        axis.set_xlabel(f"divergence {gap:.3f}\ndistance to partner {distance:.2f}", fontsize=9)
        axis.set_aspect("equal")
        axis.set(xticks=[], yticks=[], xlim=(-3.2, 3.2), ylim=(-2.9, 2.3))
        print(f"flow: {name:26s} divergence {gap:.4f}, mean distance to partner {distance:.3f}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def sphere_sets(count: int, dim: int, gap: float, *, same_shape: bool = False, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two sets of unit vectors a gap apart, of one shape or strong in different directions."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(1.5, 0.5, dim)
    x = torch.randn(count, dim, generator=generator) * (scale if same_shape else scale.flip(0))
    y = torch.randn(count, dim, generator=generator) * scale
    y[:, 0] += gap * dim**0.5
    return F.normalize(x, dim=1), F.normalize(y, dim=1)


def draw_bandwidth(path: Path) -> None:
    """The divergence of two sets against the bandwidth, with and without the diagonal, for several set sizes."""
    widths = torch.logspace(-1.1, 0.7, 24).tolist()
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    cases = (("a gap of 0.6 and different shapes", 0.75, False), ("two draws from one distribution", 0.0, True))
    for axis, (title, gap, same_shape) in zip(axes, cases, strict=True):
        for count, shade in ((64, 0.35), (256, 0.65), (1024, 1.0)):
            x, y = sphere_sets(count, 64, gap, same_shape=same_shape)
            for diagonal, colour, style in ((True, COLOURS["blue"], "-"), (False, COLOURS["red"], "--")):
                values = [cauchy_schwarz_divergence(x, y, bandwidth=w, diagonal=diagonal).item() for w in widths]
                values = [v if v > 1e-4 else float("nan") for v in values]
                label = f"{'with' if diagonal else 'without'} diagonal, N = {count}"
                axis.plot(widths, values, style, color=colour, alpha=shade, label=label, linewidth=1.6)
        distance = (x.mean(0) - y.mean(0)).norm().item()
        axis.plot(
            widths, [distance**2 / w**2 for w in widths], ":", color=COLOURS["ink"], label="(centroid gap / s)^2"
        )
        axis.set(xscale="log", yscale="log", xlabel="bandwidth s", title=title, ylim=(1e-4, 300))
        axis.grid(alpha=0.25)
        print(f"bandwidth: {title}, centroid gap {distance:.3f}")
    axes[0].set_ylabel("Cauchy-Schwarz divergence")
    axes[1].legend(fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    figures = Path(__file__).resolve().parent.parent / "docs/figures"
    draw_flow(figures / "loss_flow.png")
    draw_bandwidth(figures / "loss_bandwidth.png")
