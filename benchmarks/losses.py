"""Speed and memory of the losses against matrix products, dense autograd and geomloss.

    python benchmarks/losses.py            # the table, about 20 minutes on two idle cores
    python benchmarks/losses.py --quick    # a minute
    python benchmarks/losses.py --small    # only N up to 1024, without memory
    python benchmarks/losses.py --full     # also N = 32,768 and 65,536; hours on a processor

Prints markdown. Every time stands as a ratio to the bare matrix products of the same shapes: every contestant runs
between two runs of the products, and the median ratio is printed, so that other work on the machine weighs on both
alike; `--clock cpu` counts the time of the process's threads in place of the clock on the wall, for a machine that is
shared. "Products" are those of the gradient wanted: for x alone `x x^T`, `x y^T`, `w x`, `w y`; for both sides also
`y y^T`, `w y`, `w^T x`. Memory is the growth of the process's peak beyond its inputs, in a process of its own.
"""

import argparse
import datetime
import multiprocessing
import platform
import statistics
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from csdiff.losses import cauchy_schwarz_divergence, info_nce, log_mean_kernel, token_cauchy_schwarz_divergence

BANDWIDTH = 0.5
# Largest N at which contestants that hold an N x N matrix are tried.
DENSE_LIMIT = 8192


def unit_sets(n: int, dim: int, dtype: torch.dtype, device: str, both: bool) -> tuple[Tensor, Tensor]:
    """Two sets of unit vectors a modality gap apart."""
    generator = torch.Generator().manual_seed(0)
    x = F.normalize(torch.randn(n, dim, generator=generator), dim=1)
    y = F.normalize(torch.randn(n, dim, generator=generator) + 0.3, dim=1)
    return x.to(device, dtype).requires_grad_(), y.to(device, dtype).requires_grad_(both)


class Products:
    """The floor: nothing but the matrix products a value and its gradient take."""

    def __init__(self, x: Tensor, y: Tensor, *, contrastive: bool = False):
        # On a processor bfloat16 rows are multiplied in float32.
        dtype = x.dtype if x.device.type == "cuda" else torch.float32
        self.x, self.y = x.detach().to(dtype), y.detach().to(dtype)
        self.both, self.contrastive = y.requires_grad, contrastive
        self.block = min(len(x), 8192)
        self.weight = torch.rand(self.block, self.block, device=x.device).to(dtype)

    @property
    def flops(self) -> float:
        count = (3 if self.both else 2) if self.contrastive else (7 if self.both else 4)
        return count * 2 * len(self.x) ** 2 * self.x.shape[1]

    def __call__(self) -> None:
        # In pieces as large as memory allows at large N; whole below.
        for i in range(0, len(self.x), self.block):
            for j in range(0, len(self.x), self.block):
                a, b, c = self.x[i : i + self.block], self.x[j : j + self.block], self.y[j : j + self.block]
                w = self.weight[: len(a), : len(b)]
                _ = a @ c.T, w @ c
                if not self.contrastive:
                    _ = a @ b.T, w @ b
                if self.both:
                    _ = w.T @ a
                    if not self.contrastive:
                        _ = c @ c.T, w @ c


def cdist_divergence(x: Tensor, y: Tensor) -> Tensor:
    """The usual way: distances, kernel, mean, logarithm."""
    terms = [
        torch.exp(-(torch.cdist(a, b) ** 2) / (2 * BANDWIDTH**2)).mean().log() for a, b in ((x, x), (y, y), (x, y))
    ]
    return terms[0] + terms[1] - 2 * terms[2]


def dense_divergence(x: Tensor, y: Tensor) -> Tensor:
    """All pairs at once in log space, by expanded squares."""

    def log_mean(a, b):
        square = a.square().sum(1)[:, None] + b.square().sum(1)[None] - 2 * a @ b.T
        return (-square / (2 * BANDWIDTH**2)).flatten().logsumexp(0)

    return log_mean(x, x) + log_mean(y, y) - 2 * log_mean(x, y)


def geomloss_mmd(x: Tensor, y: Tensor) -> Tensor:
    from geomloss import SamplesLoss

    return SamplesLoss("gaussian", blur=BANDWIDTH, backend="tensorized")(x, y)


def dense_info_nce(x: Tensor, y: Tensor) -> Tensor:
    """As open_clip computes it in one process."""
    logits = x @ y.T / 0.07
    labels = torch.arange(len(x), device=x.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def contestants(n: int, dim: int, dtype: torch.dtype, both: bool) -> dict:
    """Name to a function of x, y and the frozen target's constant term."""
    found = {"csdiff": lambda x, y, _: cauchy_schwarz_divergence(x, y, bandwidth=BANDWIDTH)}
    if not both:
        found = {
            "csdiff, constant passed in": lambda x, y, constant: cauchy_schwarz_divergence(
                x, y, bandwidth=BANDWIDTH, within_y=constant
            ),
            **found,
        }
    if n <= DENSE_LIMIT and dtype == torch.float32:
        found["cdist + autograd"] = lambda x, y, _: cdist_divergence(x, y)
        found["dense, log space"] = lambda x, y, _: dense_divergence(x, y)
    if n <= 4096 and dtype == torch.float32 and find_spec("geomloss"):
        found["geomloss gaussian MMD"] = lambda x, y, _: geomloss_mmd(x, y)
    return found


clock = time.perf_counter


def timed(function, device: str, repeats: int = 1) -> float:
    start = clock()
    for _ in range(repeats):
        function()
    if device == "cuda":
        torch.cuda.synchronize()
    return (clock() - start) / repeats


def race(floor: Products, functions: dict, device: str, rounds: int, repeats: int) -> tuple[float, dict[str, float]]:
    """Median time of the floor and the median ratio of each contestant to it, round by round."""
    # What takes seconds needs no warming up.
    for function in (floor, *functions.values()) if floor.flops < 1e11 else ():
        timed(function, device)
    floors, ratios = [], {name: [] for name in functions}
    for _ in range(rounds):
        floors.append(timed(floor, device, repeats))
        for name, function in functions.items():
            # Each between two floors: what else the machine does changes within a round too.
            own = timed(function, device, repeats)
            floors.append(timed(floor, device, repeats))
            ratios[name].append(2 * own / (floors[-2] + floors[-1]))
    return statistics.median(floors), {name: statistics.median(found) for name, found in ratios.items()}


def step(loss, *leaves: Tensor):
    def run():
        for leaf in leaves:
            leaf.grad = None
        loss().backward()

    return run


def _peak(connection, name: str, n: int, dim: int, dtype: torch.dtype, device: str) -> None:
    x, y = unit_sets(n, dim, dtype, device, both=False)
    losses = {
        "csdiff": lambda a, b: cauchy_schwarz_divergence(a, b, bandwidth=BANDWIDTH),
        "cdist": cdist_divergence,
        "dense": dense_divergence,
        "info_nce": lambda a, b: info_nce(a, b, temperature=0.07),
        "dense_info_nce": dense_info_nce,
    }
    losses[name](x[:64], y[:64]).backward()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        start = time.process_time()
        losses[name](x, y).backward()
        connection.send((torch.cuda.max_memory_allocated() - before, time.process_time() - start))
        return
    before = _resident("VmRSS")
    start = time.process_time()
    losses[name](x, y).backward()
    connection.send((_resident("VmHWM") - before, time.process_time() - start))


def _resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def peak_memory(name: str, n: int, dim: int, dtype: torch.dtype, device: str) -> tuple[float, float]:
    """Megabytes at the peak of value and gradient of x, beyond the inputs, and seconds of processor time."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_peak, args=(there, name, n, dim, dtype, device))
    process.start()
    peak, seconds = here.recv()
    process.join()
    return peak / 1e6, seconds


def divergence_table(args, shapes) -> None:
    print("\n### Cauchy-Schwarz divergence, value and gradient\n")
    print("| N | D | dtype | gradient | products, s | GFLOP/s of products | loss | ratio to products |")
    print("|---:|---:|---|---|---:|---:|---|---:|")
    for n, dim, dtype, both in shapes:
        x, y = unit_sets(n, dim, dtype, args.device, both)
        constant = log_mean_kernel(y.detach(), bandwidth=BANDWIDTH)
        functions = {
            name: step(partial(function, x, y, constant), x, y)
            for name, function in contestants(n, dim, dtype, both).items()
        }
        floor = Products(x, y)
        repeats = max(1, min(50, int(2e10 / floor.flops)))
        seconds, ratios = race(floor, functions, args.device, args.rounds, repeats)
        for name, ratio in ratios.items():
            kind = f"{n:,} | {dim} | {str(dtype)[6:]} | {'x and y' if both else 'x'}"
            print(f"| {kind} | {seconds:.4g} | {floor.flops / seconds / 1e9:.0f} | {name} | {ratio:.2f} |", flush=True)


def info_nce_table(args, shapes) -> None:
    print("\n### InfoNCE, two-sided, value and gradient of both sides\n")
    print("| N | D | products, s | loss | ratio to three products |")
    print("|---:|---:|---:|---|---:|")
    for n, dim in shapes:
        x, y = unit_sets(n, dim, torch.float32, args.device, both=True)
        functions = {"csdiff": step(partial(info_nce, x, y, temperature=0.07), x, y)}
        if n <= 2 * DENSE_LIMIT:
            functions["dense, as open_clip"] = step(partial(dense_info_nce, x, y), x, y)
        floor = Products(x, y, contrastive=True)
        seconds, ratios = race(floor, functions, args.device, args.rounds, max(1, min(50, int(2e10 / floor.flops))))
        for name, ratio in ratios.items():
            print(f"| {n:,} | {dim} | {seconds:.4g} | {name} | {ratio:.2f} |", flush=True)


def token_table(args, batch: int) -> None:
    print("\n### Token term, 77 text against 257 image tokens, D = 768, gradient of x\n")
    x = F.normalize(torch.randn(batch, 77, 768), dim=2).to(args.device).requires_grad_()
    y = F.normalize(torch.randn(batch, 257, 768), dim=2).to(args.device)
    loop = step(lambda: torch.stack([dense_divergence(a, b) for a, b in zip(x, y, strict=True)]).mean(), x)
    own = step(lambda: token_cauchy_schwarz_divergence(x, y, bandwidth=BANDWIDTH), x)
    ratios = [timed(own, args.device) / timed(loop, args.device) for _ in range(args.rounds + 1)][1:]
    print(f"{batch} pairs: {statistics.median(ratios):.2f} of the time of a loop over pairs with dense autograd.")


def memory_table(args, shapes) -> None:
    print("\n### Peak memory beyond the inputs, value and gradient of x, float32\n")
    print("| N | D | loss | MB |")
    print("|---:|---:|---|---:|")
    for n, dim in shapes:
        names = ["csdiff", "info_nce"] + (["cdist", "dense", "dense_info_nce"] if n <= DENSE_LIMIT else [])
        for name in names:
            peak, _ = peak_memory(name, n, dim, torch.float32, args.device)
            print(f"| {n:,} | {dim} | {name} | {peak:.0f} |", flush=True)


def growth_table(args) -> None:
    print("\n### Growth with N, csdiff, D = 768, value and gradient of x, float32\n")
    print("| N | MB beyond the inputs | processor time, s |\n|---:|---:|---:|")
    for n in (4096, 8192) if args.quick else (4096, 8192, 16384, 32768, 65536):
        peak, seconds = peak_memory("csdiff", n, 768, torch.float32, args.device)
        print(f"| {n:,} | {peak:.0f} | {seconds:.3g} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, one round")
    parser.add_argument("--full", action="store_true", help="also the sizes that take hours on a processor")
    parser.add_argument("--small", action="store_true", help="only N up to 1024")
    parser.add_argument("--growth", action="store_true", help="only memory and time up to N = 65,536; ten minutes")
    parser.add_argument("--headline", action="store_true", help="only N = 8192, D = 1280")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=None, help="of the processor; all by default")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--rounds", type=int, default=None)
    args = parser.parse_args()
    args.rounds = args.rounds or (1 if args.quick else 3)
    if args.clock == "cpu":
        global clock
        clock = time.process_time
    if args.threads:
        torch.set_num_threads(args.threads)

    name = torch.cuda.get_device_name() if args.device == "cuda" else _processor()
    today = datetime.datetime.now(datetime.UTC).date()
    print(f"Losses, {today}, {name}, {torch.get_num_threads()} threads, torch {torch.__version__}.", end=" ")
    print(f"Median of {args.rounds} rounds; {args.clock} time.")
    f32, bf16 = torch.float32, torch.bfloat16
    if args.growth:
        return growth_table(args)
    if args.quick:
        divergence_table(args, [(256, 512, f32, False), (1024, 512, f32, False), (1024, 512, f32, True)])
        info_nce_table(args, [(1024, 512)])
        return memory_table(args, [(2048, 512)])
    headline = [(8192, 1280, f32, False)]
    if args.headline:
        divergence_table(args, headline)
        return memory_table(args, [(8192, 1280)])
    small = [(n, dim, f32, False) for n in (64, 256, 1024) for dim in (512, 768, 1280)]
    pairs = [(64, 512), (256, 512), (1024, 512)]
    if args.small:
        divergence_table(args, small)
        return info_nce_table(args, pairs)
    middle = [(4096, dim, f32, both) for dim in (512, 768, 1280) for both in (False, True)]
    large = [(8192, 1280, f32, True), (8192, 1280, bf16, False), (16384, 768, f32, False)]
    if args.full:
        large += [(32768, 768, f32, False), (65536, 768, f32, False), (65536, 768, bf16, False)]
    divergence_table(args, small + middle + headline + large)
    info_nce_table(args, [*pairs, (4096, 768), (8192, 1280)])
    token_table(args, 32)
    return memory_table(args, [(4096, 1280), (8192, 1280), (16384, 768)] + ([(65536, 768)] if args.full else []))


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip() + f" ({torch.backends.cpu.get_cpu_capability()})"
    return platform.processor()


if __name__ == "__main__":
    main()
