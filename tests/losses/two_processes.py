"""A problem that can be solved by one process, or by two that hold uneven shares of it.

The adapter is a linear map of the text side and one of the image side; gradients are averaged over processes as DDP
does, and once by DDP itself.
"""

import json
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from csdiff.losses import (
    build_objective,
    cauchy_schwarz_divergence,
    info_nce,
    log_mean_kernel,
    token_cauchy_schwarz_divergence,
)

DIM = 6
# The shares of the first of two processes: pairs, unpaired texts, unpaired images.
SHARES = {"pairs": 3, "unpaired_text": 4, "unpaired_image": 0}


def problem(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    pairs = {"text": draw(11, DIM), "source": draw(11, DIM), "text_tokens": draw(11, 3, DIM)}
    pairs["image"] = pairs["text"] + 0.5 * draw(11, DIM) + 0.3
    pairs["image_tokens"] = draw(11, 4, DIM)
    maps = {"text": torch.eye(DIM, dtype=dtype) + 0.2 * draw(DIM, DIM), "image": torch.eye(DIM, dtype=dtype)}
    return pairs, {"unpaired_text": draw(7, DIM), "unpaired_image": draw(5, DIM)}, maps


def share(rows, first, rank):
    if rank is None:
        return rows
    return rows[:first] if rank == 0 else rows[first:]


def solve(case, dtype, rank=None, group=None):
    """The loss and the averaged gradients of the maps and of the temperature."""
    pairs, unpaired, maps = problem(dtype)
    pairs = {key: share(rows, SHARES["pairs"], rank) for key, rows in pairs.items()}
    unpaired = {key: share(rows, SHARES[key], rank) for key, rows in unpaired.items()}
    parameters = [maps["text"].requires_grad_(), maps["image"].requires_grad_()]
    parameters.append(torch.tensor(0.3, dtype=dtype, requires_grad=True))
    inputs = {
        "x": pairs["text"] @ maps["text"],
        "y": pairs["image"] @ maps["image"],
        "source": pairs["source"],
        "x_unpaired": unpaired["unpaired_text"] @ maps["text"],
        "y_unpaired": unpaired["unpaired_image"] @ maps["image"],
        "x_tokens": pairs["text_tokens"] @ maps["text"],
        "y_tokens": pairs["image_tokens"] @ maps["image"],
        "temperature": parameters[2],
    }
    loss = CASES[case](inputs, group)
    loss.backward()
    gradients = []
    for parameter in parameters:
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if group is not None:
            dist.all_reduce(gradient, group=group)
            gradient /= dist.get_world_size(group)
        gradients.append(gradient)
    return [loss.detach().double().item(), *(g.double().tolist() for g in gradients)]


def solve_with_ddp(rank=None, group=None):
    """The gradient that DDP leaves on a linear adapter trained by `CSAlignerLoss`."""
    pairs, _, maps = problem()
    pairs = {key: share(rows, SHARES["pairs"], rank) for key, rows in pairs.items()}
    adapter = torch.nn.Linear(DIM, DIM, dtype=torch.float64)
    with torch.no_grad():
        adapter.weight.copy_(maps["text"])
        adapter.bias.fill_(0.1)
    model = adapter if group is None else DistributedDataParallel(adapter, process_group=group)
    build_objective("cs_aligner", group=group)(model(pairs["text"]), pairs["image"]).loss.backward()
    return [adapter.weight.grad.tolist(), adapter.bias.grad.tolist()]


def divergence(**options):
    return lambda t, group: cauchy_schwarz_divergence(
        torch.cat([t["x"], t["x_unpaired"]]), torch.cat([t["y"], t["y_unpaired"]]), group=group, **options
    )


def objective(name, **options):
    def loss(t, group):
        return build_objective(name, group=group, **options)(
            t["x"],
            t["y"],
            source_text=t["source"],
            unpaired_text=t["x_unpaired"],
            unpaired_image=t["y_unpaired"],
            text_tokens=t["x_tokens"],
            image_tokens=t["y_tokens"],
        ).loss

    return loss


CASES = {
    "cs": divergence(bandwidth=2.0),
    "cs unit rows, no diagonal": divergence(bandwidth=(0.4, 1.0), normalize=True, diagonal=False),
    "cs in blocks": divergence(bandwidth=1.0, block_size=3),
    "cs with wide kernel": divergence(bandwidth=50.0),
    "cs with narrow kernel": divergence(bandwidth=0.5),
    "cs median": divergence(bandwidth="median"),
    "cs frozen target": lambda t, group: cauchy_schwarz_divergence(
        t["x"], t["y"].detach(), bandwidth=1.0, group=group
    ),
    "within": lambda t, group: log_mean_kernel(t["x"], bandwidth=1.0, group=group),
    "between": lambda t, group: log_mean_kernel(t["x"], t["y_unpaired"], bandwidth=2.0, group=group),
    "info_nce": lambda t, group: info_nce(t["x"], t["y"], temperature=t["temperature"], normalize=True, group=group),
    "info_nce in blocks": lambda t, group: info_nce(
        t["x"], t["y"], temperature=t["temperature"], block_size=2, group=group
    ),
    "info_nce one-sided": lambda t, group: info_nce(
        t["x"], t["y"], temperature=t["temperature"], two_sided=False, normalize=True, group=group
    ),
    "tokens": lambda t, group: token_cauchy_schwarz_divergence(
        t["x_tokens"], t["y_tokens"], bandwidth=1.0, normalize=True, group=group
    ),
    "tokens silverman": lambda t, group: token_cauchy_schwarz_divergence(
        t["x_tokens"], t["y_tokens"], bandwidth="silverman", group=group
    ),
    "objective cs_aligner": objective(
        "cs_aligner", source_weight=0.3, regression_weight=0.5, regression_rows="standardized"
    ),
    "objective cs": objective("cs", info_nce_weight=1.0),
    "objective mse": objective("mse"),
    "objective eclipse": objective("eclipse", rows="unit"),
    "objective mmd": objective("mmd", diagonal=False),
    "objective coral": objective("coral", mean_weight=1.0),
    "objective kl": objective("kl", bandwidth=1.0),
    "objective uniform_align": objective("uniform_align"),
    "objective modgap": objective("modgap"),
}


def spoil(kind, rank):
    """Bad input on one process alone."""
    x = torch.ones(4 - rank, DIM) + torch.arange(4.0 - rank)[:, None]
    if kind == "nan" and rank == 1:
        x[1, 2] = float("nan")
    if kind == "width" and rank == 1:
        x = x[:, :-1]
    if kind == "dtype" and rank == 1:
        x = x.double()
    return x


def refusals(rank, group):
    found = {}
    losses = {
        "cs": lambda x: cauchy_schwarz_divergence(x, x, bandwidth=1.0, group=group),
        "info_nce": lambda x: info_nce(x, x, temperature=1.0, group=group),
        "tokens": lambda x: token_cauchy_schwarz_divergence(x[None], x[None], bandwidth=1.0, group=group),
    }
    for name, loss in losses.items():
        for kind in ("nan",) if name == "tokens" else ("nan", "width", "dtype"):
            try:
                loss(spoil(kind, rank))
                found[f"{name} {kind}"] = None
            except ValueError as error:
                found[f"{name} {kind}"] = str(error)
    return found


def run(rank, world, folder):
    """One of `world` processes: solve every case and write the results."""
    torch.set_num_threads(1)
    folder = Path(folder)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=world)
    group = dist.group.WORLD
    results = {
        f"{case} {dtype}": solve(case, dtype, rank, group)
        for case in CASES
        for dtype in (torch.float64, torch.float32)
    }
    ddp = solve_with_ddp(rank, group)
    found = {"results": results, "ddp": ddp, "refusals": refusals(rank, group)}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
