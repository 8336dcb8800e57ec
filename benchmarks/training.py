"""How fast training is, against a bare loop and against the stock way; prints markdown tables.

    python benchmarks/training.py [--quick]

Ratios compare within one run; the rounds of the two sides alternate, and the median is taken, so that other work on
the machine troubles both alike.
"""

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from csdiff.adapters import build_adapter
from csdiff.embeddings import EmbeddingStore
from csdiff.losses import build_objective
from csdiff.training.config import TrainConfig
from csdiff.training.data import Pairs
from csdiff.training.inputs import Inputs
from csdiff.training.model import Embedder
from csdiff.training.task import AlignmentTask, split


def plain_store(folder: Path, rows: int, dim: int) -> EmbeddingStore:
    """Random raw pairs in the clip-retrieval layout."""
    draw = np.random.default_rng(0)
    for name in ("text_emb", "img_emb"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        np.save(folder / name / f"{name}_0.npy", draw.standard_normal((rows, dim), np.float32).astype(np.float16))
    return EmbeddingStore.open(folder)


def make_task(dim: int, batch: int, group=None) -> AlignmentTask:
    """Training of an MLP adapter."""
    config = TrainConfig(batch_size=batch, max_steps=10_000, learning_rate=1e-4)
    torch.manual_seed(0)
    embedder = Embedder(build_adapter("mlp", embedding_dim=dim)).train()
    return AlignmentTask(embedder, build_objective("cs_aligner", group=group), config, group)


def bare_step(dim: int):
    """The same mathematics as a hand-written loop: adapter, objective, clipping, AdamW, running average."""
    torch.manual_seed(0)
    adapter = build_adapter("mlp", embedding_dim=dim).train()
    objective = build_objective("cs_aligner")
    parameters = list(adapter.parameters())
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.01, fused=True)

    def step(batch):
        loss = objective(adapter.embed(batch["text_embeds"]), batch["image_embeds"]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 0.001)
        return loss

    return step


def alternate(sides: dict[str, object], rounds: int, repeat: int = 1) -> dict[str, list[float]]:
    """Seconds of each side, round by round, after one round of warm-up."""
    seconds = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, run in sides.items():
            began = time.perf_counter()
            for _ in range(repeat):
                run()
            if number:
                seconds[name].append((time.perf_counter() - began) / repeat)
    return seconds


def ratio(seconds: dict[str, list[float]], one: str, other: str) -> float:
    """Median over the rounds of `one` over `other`: neighbours in time meet the same machine."""
    return statistics.median(a / b for a, b in zip(seconds[one], seconds[other], strict=True))


def overhead(rounds: int, folder: Path) -> None:
    dim, batch = 512, 4096
    store = plain_store(folder / "store", 8 * batch, dim)
    inputs, task = Inputs("cpu"), make_task(dim, batch)
    feed = inputs.feed({"pairs": Pairs(store)}, {"pairs": batch}, seed=0)
    memory, step = store.read(range(len(store))), bare_step(dim)

    def bare():
        rows = torch.randint(len(store), (batch,))
        step({name: values[rows] for name, values in memory.items()}).item()

    seconds = alternate(
        {
            "csdiff": lambda: task.step(next(feed)),
            "bare": bare,
        },
        rounds,
    )
    print("\n### The loop against a bare PyTorch loop of the same mathematics\n")
    print(
        f"Batch {batch}, {dim} dimensions, MLP adapter, cs_aligner, float32; csdiff reads float16 rows from a store,"
    )
    print("bare indexes float32 in memory.\n")
    print("| loop | seconds a step | samples/s | over bare |\n|---|---|---|---|")
    for name in seconds:
        middle = statistics.median(seconds[name])
        print(f"| {name} | {middle:.3f} | {batch / middle:,.0f} | {ratio(seconds, name, 'bare'):.2f}x |")


def stock_way(rounds: int, folder: Path, full: bool) -> None:
    """Both towers at every step and a denoising loss, on the same encoders and an adapter of the same size."""
    from csdiff.resources import assets_dir

    clip_folder = assets_dir() / "clip"
    if not clip_folder.is_dir():
        sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
        from tiny import make_tiny_clip

        clip_folder = make_tiny_clip(folder / "clip")
    lengths = caption_lengths(clip_folder)
    rows = [tower_rates("shipped tiny CLIP", tiny_towers(clip_folder), 64, rounds, lengths)]
    if full:
        rows.append(tower_rates("ViT-L/14, random weights", large_towers(), 4, 2, lengths))
    print("\n### Cached embeddings against both towers at every step (diffusion prior, as the stock recipe)\n")
    print("| encoders, adapter | adapter weights | towers + diffusion, samples/s | cached, samples/s | ratio |")
    print("|---|---|---|---|---|")
    for row in rows:
        print(row)


def caption_lengths(clip_folder: Path) -> list[int]:
    """Tokens of 1,024 of the shipped captions."""
    import pyarrow.parquet as pq
    from transformers import AutoTokenizer

    from csdiff.resources import assets_dir

    captions = pq.read_table(assets_dir() / "data/train.parquet", columns=["captions"]).column(0)[:1024].to_pylist()
    tokens = AutoTokenizer.from_pretrained(clip_folder)([several[0] for several in captions])["input_ids"]
    return [len(row) for row in tokens]


def tiny_towers(folder: Path):
    from transformers import CLIPModel

    return CLIPModel.from_pretrained(folder).eval().requires_grad_(False)


def large_towers():
    """A CLIP ViT-L/14 with random weights: time does not depend on them."""
    from transformers import CLIPConfig, CLIPModel

    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    config = CLIPConfig(text_config=text, vision_config={**vision, "patch_size": 14}, projection_dim=768)
    return CLIPModel(config).eval().requires_grad_(False)


def tower_rates(name: str, clip, batch: int, rounds: int, lengths: list[int]) -> str:
    """One row: samples a second of both ways with adapters of one size, on captions of so many tokens."""
    dim, states = clip.config.projection_dim, clip.config.text_config.hidden_size
    length, side = clip.config.text_config.max_position_embeddings, clip.config.vision_config.image_size
    size = {"num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 32, "num_embeddings": length}
    if dim >= 768:
        size |= {"num_layers": 10, "num_attention_heads": 16}
    prior = build_adapter("diffusion", embedding_dim=dim, states_dim=states, **size).train()
    adapter = build_adapter("transformer", embedding_dim=dim, text_dim=dim, states_dim=states, **size).train()
    objective = build_objective("cs_aligner")
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-4, fused=True) for m in (prior, adapter)]
    ids = torch.randint(0, clip.config.text_config.vocab_size - 1, (batch, length))
    ids[:, -1] = clip.config.text_config.eos_token_id
    # Captions have their usual lengths. Both ways pad to the tokenizer's limit; the adapter cuts what is padding in
    # every row of its batch, the towers and the prior of the recipe compute on it.
    used = torch.as_tensor(lengths).clamp(max=length)
    pixels = torch.randn(batch, 3, side, side)
    cached_batch = 256
    text, image = torch.randn(cached_batch, dim), torch.randn(cached_batch, dim)
    cached = torch.randn(cached_batch, length, states)
    mask = torch.arange(length) < used[torch.arange(cached_batch) % len(used), None]

    def stock():
        with torch.no_grad():
            output = clip.text_model(ids)
            embeds = clip.text_projection(output.pooler_output)
            image_embeds = clip.visual_projection(clip.vision_model(pixels).pooler_output)
        prior.training_loss(embeds, image_embeds, output.last_hidden_state, mask[:batch]).backward()
        optimizers[0].step()
        optimizers[0].zero_grad()

    mlp = build_adapter("mlp", embedding_dim=dim, num_layers=2).train()
    mlp_optimizer = torch.optim.AdamW(mlp.parameters(), lr=1e-4, fused=True)

    def ours():
        objective(adapter.embed(text, cached, mask), image).loss.backward()
        optimizers[1].step()
        optimizers[1].zero_grad()

    def pooled():
        objective(mlp.embed(text), image).loss.backward()
        mlp_optimizer.step()
        mlp_optimizer.zero_grad()

    seconds = alternate({"stock": stock, "ours": ours, "pooled": pooled}, rounds)
    stock_rate = batch / statistics.median(seconds["stock"])
    lines = []
    for label, model, key in (("transformer", adapter, "ours"), ("mlp", mlp, "pooled")):
        rate = cached_batch / statistics.median(seconds[key])
        times = ratio(seconds, "stock", key) * cached_batch / batch
        count = sum(p.numel() for p in model.parameters())
        lines.append(f"| {name}, {label} | {count:,} | {stock_rate:,.1f} | {rate:,.0f} | {times:.0f}x |")
    return "\n".join(lines)


def gradient_cache(rounds: int, batches: list[int]) -> None:
    print("\n### Gradient cache: 10-layer transformer of 256 on 16 text tokens, 512 dimensions\n")
    print("| pairs before the objective | micro-batch | peak memory over the start, MB | time, s | over one pass |")
    print("|---|---|---|---|---|")
    for batch in batches:
        rows = {}
        for micro in (None, 128):
            rows[micro] = measured("cache_step", batch, micro, rounds)
        for micro, (peak, seconds) in rows.items():
            times = seconds / rows[None][1]
            print(f"| {batch:,} | {micro or 'one pass'} | {peak:,.0f} | {seconds:.2f} | {times:.2f}x |")


def cache_step(batch: int, micro: int | None, rounds: int) -> dict:
    """Peak memory and median time of one gradient, in a process of its own."""
    sizes = {"num_layers": 10, "num_attention_heads": 4, "attention_head_dim": 64}
    adapter = build_adapter("transformer", embedding_dim=512, states_dim=256, num_embeddings=16, **sizes).train()
    task = AlignmentTask(Embedder(adapter), build_objective("cs_aligner"))
    rows = {
        "text_embeds": torch.randn(batch, 512),
        "image_embeds": torch.randn(batch, 512),
        "text_states": torch.randn(batch, 16, 256),
        "text_mask": torch.ones(batch, 16, dtype=torch.bool),
    }
    # One small gradient first: gradients and workspaces are there before the peak counts.
    task.backward(split({"pairs": rows}, 16)[0], None)
    before = forget_peak()
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        task.backward({"pairs": rows}, micro)
        seconds.append(time.perf_counter() - began)
    return {"peak": memory("VmHWM") - before, "seconds": statistics.median(seconds)}


def forget_peak() -> float:
    """Make the peak of resident memory start anew from what is resident now, in MB (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def memory(name: str) -> float:
    """An entry of `/proc/self/status` in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def measured(function: str, *arguments) -> tuple[float, float]:
    """Run a function of this file in a fresh process."""
    output = subprocess.run(
        [sys.executable, __file__, "--call", function, json.dumps(arguments)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    result = json.loads(output.splitlines()[-1])
    return result["peak"], result["seconds"]


def two_processes(rounds: int) -> None:
    print("\n### Two gloo processes against one, one thread each\n")
    print("| processes | global batch | seconds a step | speed-up | efficiency |\n|---|---|---|---|---|")
    batch, seconds = 4096, {}
    for size in (1, 2):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        common = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(size)}
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, __file__, "--call", "group_step", json.dumps([batch, rounds])]
        started = [
            subprocess.Popen(command, env={**common, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
            for rank in range(size)
        ]
        outputs = [process.communicate()[0] for process in started]
        seconds[size] = json.loads(outputs[0].splitlines()[-1])["seconds"]
        speed = seconds[1] / seconds[size]
        print(f"| {size} | {batch:,} | {seconds[size]:.3f} | {speed:.2f}x | {speed / size:.0%} |")


def group_step(batch: int, rounds: int) -> dict:
    """Median time of a step with the share of this process."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    dim, world = 512, dist.get_world_size()
    task = make_task(dim, batch, dist.group.WORLD)
    rows = {"text_embeds": torch.randn(batch // world, dim), "image_embeds": torch.randn(batch // world, dim)}
    seconds = alternate({"step": lambda: task.step({"pairs": rows})}, rounds)["step"]
    dist.destroy_process_group()
    return {"seconds": statistics.median(seconds), "peak": 0.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, smaller batches, no real-size towers")
    parts = ("overhead", "stock", "cache", "processes")
    parser.add_argument("--part", choices=parts, action="append", help="only this table; may be given again")
    parser.add_argument("--call", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.call:
        function = {"cache_step": cache_step, "group_step": group_step}[options.call[0]]
        print(json.dumps(function(*json.loads(options.call[1]))))
        return
    rounds = 3 if options.quick else 9
    machine = (
        f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    print(f"{machine}, {time.strftime('%Y-%m-%d')}; load average at the start {os.getloadavg()[0]:.1f}.")
    chosen = options.part or parts
    with tempfile.TemporaryDirectory() as folder:
        if "overhead" in chosen:
            overhead(rounds, Path(folder))
        if "stock" in chosen:
            stock_way(rounds, Path(folder), full=not options.quick)
    if "cache" in chosen:
        gradient_cache(1 if options.quick else 3, [512, 1024] if options.quick else [512, 1024, 2048, 4096])
    if "processes" in chosen:
        two_processes(rounds)


if __name__ == "__main__":
    main()
