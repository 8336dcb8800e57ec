"""Text embedding to image embedding: one adapter pass against a diffusion prior, and how fast `generate` starts cold.

python benchmarks/prior.py [--quick] [--device cuda]

Prints markdown. Every case runs in its own process, so that memory is its own. Diffusion priors are run as diffusers'
`KandinskyV22PriorPipeline` runs them: 25 steps, guidance 4, hence 50 passes. Weights are random (time does not depend
on them), text states are the same for all. Steps of a diffusion prior cost the same, and so do the prompts of a large
batch, so a slow case is timed over some of its 25 steps or 64 prompts and scaled; the table says over how many.
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEPS, GUIDANCE, WIDTH, TOKENS = 25, 4.0, 1280, 77
CAPTION = 14

ADAPTER = "eclipse-1280 adapter, 1 pass"
EQUAL = "diffusion prior of the same size"
REAL = "diffusion prior of Kandinsky 2.2"
SIZES = {
    EQUAL: {"num_layers": 10, "num_attention_heads": 16, "attention_head_dim": 32},
    REAL: {"num_layers": 20, "num_attention_heads": 32, "attention_head_dim": 64},
}


def build(name: str, device: str):
    """A model with random weights, made without the slow default initialisation."""
    import torch
    from diffusers import PriorTransformer

    from csdiff.adapters import TransformerAdapter

    with torch.device("meta"):
        if name == ADAPTER:
            model = TransformerAdapter.from_preset("eclipse-1280", states_dim=WIDTH)
        else:
            model = PriorTransformer(
                embedding_dim=WIDTH, num_embeddings=TOKENS, additional_embeddings=4, **SIZES[name]
            )
    model = model.to_empty(device=device).eval()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data.uniform_(-0.02, 0.02)
    if name == ADAPTER:
        model.set_statistics(torch.zeros(WIDTH), torch.ones(WIDTH), torch.zeros(WIDTH), torch.ones(WIDTH))
        model.reset_norm_calibration()
    else:
        mask = torch.full_like(model.causal_attention_mask, -10000.0).triu_(1)
        model.causal_attention_mask.copy_(mask)
    return model


def measure(
    name: str, batch: int, length: int, steps: int, repeats: int, threads: int, device: str, clock: str
) -> dict:
    """Seconds for `steps` denoising steps (or the adapter's pass), peak memory beyond the weights, and parameters."""
    import torch
    from diffusers import UnCLIPScheduler

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = build(name, device)
    embeds = torch.randn(batch, WIDTH, device=device)
    states = torch.randn(batch, TOKENS, WIDTH, device=device)
    mask = torch.zeros(batch, TOKENS, dtype=torch.bool, device=device)
    mask[:, :length] = True
    null_embeds, null_states = torch.randn(1, WIDTH, device=device), torch.randn(1, TOKENS, WIDTH, device=device)
    null_mask = torch.zeros(1, TOKENS, dtype=torch.bool, device=device)
    null_mask[:, :2] = True

    @torch.no_grad()
    def adapter_pass():
        return model.embed(embeds, states, mask)

    @torch.no_grad()
    def denoise():
        scheduler = UnCLIPScheduler(prediction_type="sample", clip_sample_range=5.0)
        scheduler.set_timesteps(STEPS, device=device)
        condition = [
            torch.cat([null.expand_as(given), given])
            for null, given in ((null_embeds, embeds), (null_states, states), (null_mask, mask))
        ]
        latents = torch.randn(batch, WIDTH, device=device)
        for index in range(steps):
            step = scheduler.timesteps[index]
            following = scheduler.timesteps[index + 1] if index + 1 < STEPS else None
            predicted = model(torch.cat([latents] * 2), step, *condition).predicted_image_embedding
            without, with_text = predicted.chunk(2)
            predicted = without + GUIDANCE * (with_text - without)
            latents = scheduler.step(predicted, step, latents, prev_timestep=following).prev_sample
        return model.post_process_latents(latents)

    now = time.process_time if clock == "cpu" else time.perf_counter
    run = adapter_pass if name == ADAPTER else denoise
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    is_cuda = device.startswith("cuda")
    before = torch.cuda.memory_allocated() if is_cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if name == ADAPTER:
        # the others are many times longer than what a warm-up saves
        run()
    seconds = []
    for _ in range(repeats):
        start = now()
        run()
        if is_cuda:
            torch.cuda.synchronize()
        seconds.append(now() - start)
    peak = torch.cuda.max_memory_allocated() if is_cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "seconds": sorted(seconds)[len(seconds) // 2] * (1 if name == ADAPTER else STEPS / steps),
        "steps": steps,
        "weights": weights,
        "extra": max(peak - before, 0),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def in_own_process(**case) -> dict:
    """`measure` in a fresh interpreter."""
    # unlike multiprocessing.Pool, this says so when the process is killed for its memory
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, **case).result()


def prior_table(arguments) -> str:
    """The comparison, as markdown."""
    quick = arguments.quick
    lines = [
        "| text to image embedding | prompts | time | adapter is faster by | weights | memory beyond them | timed |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for batch in (1, 64):
        common = {"threads": arguments.threads, "device": arguments.device, "clock": arguments.clock}
        one = batch == 1
        cases = [
            (ADAPTER, batch, TOKENS, 1, (3 if one else 1) if quick else (7 if one else 3)),
            (f"{ADAPTER}, captions of {CAPTION} tokens", batch, CAPTION, 1, (3 if one else 1) if quick else 7),
            (
                EQUAL,
                batch if one or not quick else 16,
                TOKENS,
                (5 if one else 1) if quick else (STEPS if one else 5),
                1,
            ),
            (REAL, batch if one else (4 if quick else 16), TOKENS, STEPS if one and not quick else 1, 1),
        ]
        ours = None
        for title, rows, length, steps, repeats in cases:
            name = ADAPTER if title.startswith(ADAPTER) else title
            result = in_own_process(name=name, batch=rows, length=length, steps=steps, repeats=repeats, **common)
            seconds = result["seconds"] * batch / rows
            ours = ours or seconds
            timed = f"median of {repeats}" if name == ADAPTER else f"{steps} of {STEPS} steps"
            if rows < batch:
                timed += f", {rows} of {batch} prompts"
            ratio = "" if name == ADAPTER else f"{seconds / ours:.0f}x"
            lines.append(
                f"| {title} ({result['parameters'] / 1e6:.1f}M) | {batch} | {duration(seconds)} | {ratio} "
                f"| {result['weights'] / 2**20:.0f} MiB | {result['extra'] / 2**20:.0f} MiB | {timed} |"
            )
            print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


COLD_FLOOR = """
import sys, time
now = getattr(time, sys.argv[2])
start = now()
import torch
from diffusers import KandinskyV22Pipeline
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModelWithProjection
from csdiff.adapters import AutoAdapter
imported = now() - start
import json
from csdiff.pipelines import decoding, embedding, generate, GenerateConfig
spent = 0.0
def timed(cls, name):
    method = getattr(cls, name)
    def call(*args, **kwargs):
        global spent
        start = now()
        result = method(*args, **kwargs)
        spent += now() - start
        return result
    setattr(cls, name, call)
timed(embedding.PromptEmbedder, "embed")
timed(embedding.PromptEmbedder, "negative")
draw = decoding.KandinskyDecoder.draw
decoding.KandinskyDecoder.draw = lambda *arguments: list(draw(*arguments))
timed(decoding.KandinskyDecoder, "draw")
generate(GenerateConfig(prompt=["a red apple"], output=sys.argv[1], progress=False))
print(json.dumps({"imports": imported, "compute": spent}))
"""


def cold_table(arguments) -> str:
    """Cold `generate` against importing what it needs and computing the picture."""
    import tempfile

    if not all((ROOT / "assets" / name / "csdiff.json").is_file() for name in ("adapter", "decoder")):
        return "Cold start: not measured, the shipped models are not in assets/."
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(arguments.threads)}
    clock = "process_time" if arguments.clock == "cpu" else "perf_counter"
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "generate.py", "--prompt", "a red apple", "--output", folder, "--progress", "false"]
        # the first round fills the disk cache
        for _ in range(2 if arguments.quick else 4):
            start = _children_clock(clock)
            subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
            cold = _children_clock(clock) - start
            floor = subprocess.run(
                [sys.executable, "-c", COLD_FLOOR, folder, clock],
                cwd=ROOT,
                env=environment,
                check=True,
                capture_output=True,
                text=True,
            )
            rows.append((cold, json.loads(floor.stdout.splitlines()[-1])))
    cold, floor = min(rows[1:], key=lambda row: row[0] / sum(row[1].values()))
    return "\n".join(
        [
            "| `generate.py`, one picture, cold | time |",
            "|---|---:|",
            f"| whole command | {cold:.2f} s |",
            f"| importing what it needs | {floor['imports']:.2f} s |",
            f"| the models' own compute | {floor['compute']:.2f} s |",
            f"| whole command over the two | {cold / sum(floor.values()):.2f}x |",
        ]
    )


def _children_clock(clock: str) -> float:
    if clock == "perf_counter":
        return time.perf_counter()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def duration(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.1f} s"


def processor_name() -> str:
    """Name of the processor."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repeats and steps")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of the processor")
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: processor time, on a busy machine"
    )
    parser.add_argument("--part", choices=["all", "prior", "cold"], default="all", help="which of the two tables")
    arguments = parser.parse_args()
    import torch

    where = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else processor_name()
    how = f"{arguments.threads} threads, torch {torch.__version__}, float32, {arguments.clock} time"
    print(f"{where}, {how}, {time.strftime('%Y-%m-%d')}.\n")
    if arguments.part in ("all", "prior"):
        print(prior_table(arguments) + "\n")
    if arguments.part in ("all", "cold"):
        print(cold_table(arguments))


if __name__ == "__main__":
    main()
