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
# How many rows the first of two processes holds: of 11 pairs, of 7 unpaired texts, of 5 unpaired images.
FIRST = {11: 3, 7: 4, 5: 0}


def problem(dtype, rank):
    """The rows of all processes, or of one, and the weights of the maps."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    rows = {"text": draw(11, DIM), "source": draw(11, DIM), "text_tokens": draw(11, 3, DIM)}
    rows["image"] = rows["text"] + 0.5 * draw(11, DIM) + 0.3
    rows["image_tokens"] = draw(11, 4, DIM)
    maps = [torch.eye(DIM, dtype=dtype) + 0.2 * draw(DIM, DIM), torch.eye(DIM, dtype=dtype)]
    rows |= {"unpaired_text": draw(7, DIM), "unpaired_image": draw(5, DIM)}
    if rank is not None:
        rows = {k: v[: FIRST[len(v)]] if rank == 0 else v[FIRST[len(v)] :] for k, v in rows.items()}
    return rows, maps


def solve(case, dtype, rank=None, group=None):
    """The loss and the averaged gradients of the maps and of the temperature."""
    rows, maps = problem(dtype, rank)
    parameters = [one.requires_grad_() for one in (*maps, torch.tensor(0.3, dtype=dtype))]
    inputs = {k: v @ maps["image" in k] for k, v in rows.items()}
    loss = CASES[case]({**inputs, "source": rows["source"], "temperature": parameters[2]}, group)
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
    rows, (weight, _) = problem(torch.float64, rank)
    adapter = torch.nn.Linear(DIM, DIM, dtype=torch.float64)
    with torch.no_grad():
        adapter.weight.copy_(weight)
        adapter.bias.fill_(0.1)
    model = adapter if group is None else DistributedDataParallel(adapter, process_group=group)
    build_objective("cs_aligner", group=group)(model(rows["text"]), rows["image"]).loss.backward()
    return [adapter.weight.grad.tolist(), adapter.bias.grad.tolist()]


def divergence(**options):
    return lambda t, group: cauchy_schwarz_divergence(
        torch.cat([t["text"], t["unpaired_text"]]),
        torch.cat([t["image"], t["unpaired_image"]]),
        group=group,
        **options,
    )


def contrast(**options):
    return lambda t, group: info_nce(t["text"], t["image"], temperature=t["temperature"], group=group, **options)


def objective(name, **options):
    names = ("unpaired_text", "unpaired_image", "text_tokens", "image_tokens")

    def loss(t, group):
        given = {key: t[key] for key in names}
        return build_objective(name, group=group, **options)(
            t["text"], t["image"], source_text=t["source"], **given
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
        t["text"], t["image"].detach(), bandwidth=1.0, group=group
    ),
    "within": lambda t, group: log_mean_kernel(t["text"], bandwidth=1.0, group=group),
    "between": lambda t, group: log_mean_kernel(t["text"], t["unpaired_image"], bandwidth=2.0, group=group),
    "info_nce": contrast(normalize=True),
    "info_nce in blocks": contrast(block_size=2),
    "info_nce one-sided": contrast(two_sided=False, normalize=True),
    "tokens": lambda t, group: token_cauchy_schwarz_divergence(
        t["text_tokens"], t["image_tokens"], bandwidth=1.0, normalize=True, group=group
    ),
    "tokens silverman": lambda t, group: token_cauchy_schwarz_divergence(
        t["text_tokens"], t["image_tokens"], bandwidth="silverman", group=group
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


def refusals(rank, group):
    """What each loss says to input that is bad on the second process alone."""
    x = torch.ones(4 - rank, DIM) + torch.arange(4.0 - rank)[:, None]
    spoilt = {"nan": x.clone(), "width": x[:, :-1], "dtype": x.double()}
    spoilt["nan"][1, 2] = float("nan")
    losses = {
        "cs": lambda x: cauchy_schwarz_divergence(x, x, bandwidth=1.0, group=group),
        "info_nce": lambda x: info_nce(x, x, temperature=1.0, group=group),
        "tokens": lambda x: token_cauchy_schwarz_divergence(x[None], x[None], bandwidth=1.0, group=group),
    }
    found = {}
    for name, loss in losses.items():
        for kind in ("nan",) if name == "tokens" else spoilt:
            try:
                loss(spoilt[kind] if rank == 1 else x)
            except ValueError as error:
                found[f"{name} {kind}"] = str(error)
    return found


def run(rank, world, folder):
    """One of `world` processes: solve every case and write the results."""
    torch.set_num_threads(1)
    folder = Path(folder)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=world)
    group = dist.group.WORLD
    dtypes = (torch.float64, torch.float32)
    results = {f"{case} {dtype}": solve(case, dtype, rank, group) for case in CASES for dtype in dtypes}
    found = {"results": results, "ddp": solve_with_ddp(rank, group), "refusals": refusals(rank, group)}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
