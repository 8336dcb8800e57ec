"""One job is one method, fitted with one seed on one data set and measured; finished jobs are kept in a file."""

import contextlib
import io
import json
import multiprocessing
import os
import shutil
import subprocess
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from pathlib import Path

from .data import ROOT, assets_sha256
from .methods import QUICK, SWEEPS, TABLE, Method

CHEAP = ("real", "raw_text", "mean_shift", "ridge", "procrustes", "coral")


@dataclass(frozen=True)
class Job:
    """What is run.

    Attributes:
        part: "table", or the name of a sweep.
        data: Name of the data set.
        method: Key among the methods of the part.
        seed: Of everything random.
        steps: Optimizer steps in place of the recipe's, or None.
    """

    part: str
    data: str
    method: str
    seed: int
    steps: int | None = None

    @property
    def spec(self) -> Method:
        """The method's definition."""
        return TABLE[self.method] if self.part == "table" else SWEEPS[self.part][self.method]


def table_jobs(data: list[str], methods: list[str], seeds: int, steps: int | None = None) -> list[Job]:
    """Every method with every seed (beside those of the first table with three fifths of them), seed after seed."""
    chosen = [
        Job("table", name, method, seed, steps)
        for seed in range(seeds)
        for name in data
        for method in methods
        if (name == "shipped" or not (TABLE[method].encoder or TABLE[method].tokens))
        and seed < (seeds if method in QUICK else max(1, seeds * 3 // 5))
    ]
    return sorted(chosen, key=lambda job: (job.seed, job.method not in CHEAP, job.spec.encoder or job.spec.tokens))


def sweep_jobs(data: list[str], parts: list[str], seeds: int, steps: int | None = None) -> list[Job]:
    """Every setting of every sweep, measured on validation rows."""
    return [
        Job(part, name, method, seed, steps)
        for seed in range(seeds)
        for part in parts
        for name in data
        for method in SWEEPS[part]
        if name == "shipped" or part == "choice"
    ]


@lru_cache(maxsize=2)
def _study(name: str, seed: int, folder: str, validation: bool):
    from .data import load

    return load(name, seed, Path(folder), validation)


@cache
def commit() -> str:
    """Commit of the code, with a mark where files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def run_job(job: Job, folder: str) -> dict:
    """Fit and measure; a record for the results file."""
    import torch
    import torch.nn.functional as F

    from csdiff.evaluation import embedding_metrics, group_agreement

    from .fit import fit, predict, recipe

    torch.set_num_threads(1)
    validation = job.part != "table"
    drawn = job.data in ("coco500", "few") or validation  # whether the seed chooses the rows
    study = _study(job.data, job.seed if drawn else 0, folder, validation)
    config = recipe(study.config)
    config.max_steps = job.steps or config.max_steps
    record = {**asdict(job), "commit": commit(), "assets": assets_sha256(), "held_out": {}}
    scratch = Path(folder) / f"job-{os.getpid()}"
    if job.spec.adapter != "real":
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said):
                fitted = fit(job.spec, study.fit, config, job.seed, scratch)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        record |= {"train_seconds": fitted.seconds, "parameters": fitted.parameters}
    for split, rows in study.held_out.items():
        start = time.process_time()
        if job.spec.adapter == "real":
            # Other real images in the place of predictions: only the distances between distributions mean something.
            others, generator = study.fit.distinct, torch.Generator().manual_seed(job.seed)
            prediction = others[torch.randperm(len(others), generator=generator)[: len(rows.index)]]
        else:
            prediction = predict(fitted.adapter, rows)
        seconds = time.process_time() - start
        metrics = embedding_metrics(prediction, rows.image, rows.text, rows.ids)
        if study.gallery is not None:
            likeness = F.normalize(prediction, dim=1) @ F.normalize(study.gallery.image, dim=1).T
            right = study.gallery.ids[likeness.argmax(1)] == rows.ids
            metrics["text_to_image"] = {"r@1": right.float().mean().item()}
        # The tables of the sweeps show no groups.
        if job.part == "table" and rows.concepts and job.spec.adapter != "real":
            metrics["groups"] = group_agreement(prediction, rows.image, rows.concepts, rows.concepts)
        record["held_out"][split] = {**metrics, "inference_ms": 1e6 * seconds / len(rows.index)}
    return record


class Results:
    """Finished jobs, one JSON object a line; an interrupted run goes on with the others.

    Records of other assets (data, encoders) stay in the file and count for nothing.

    Args:
        file: Where they are kept.
    """

    def __init__(self, file: Path):
        self.file = file
        lines = file.read_text().splitlines() if file.is_file() else []
        every = [json.loads(line) for line in lines if line.endswith("}")]
        self.records = [record for record in every if record.get("assets") == assets_sha256()]
        if others := {r["commit"] for r in self.records} - {commit()}:
            print(f"Some results are of other commits: {', '.join(sorted(others))}")

    def missing(self, jobs: list[Job]) -> list[Job]:
        """Those of the jobs that are not done."""
        done = {Job(**{key: record[key] for key in asdict(jobs[0])}) for record in self.records} if jobs else ()
        return [job for job in jobs if job not in done]

    def run(self, jobs: list[Job], folder: Path, workers: int) -> None:
        """Do what is missing."""
        missing = self.missing(jobs)
        print(f"{len(jobs) - len(missing)} of {len(jobs)} jobs are done", flush=True)
        began = time.perf_counter()
        for count, record in enumerate(self._records(missing, str(folder), workers), start=1):
            self.records.append(record)
            with self.file.open("a") as file:
                file.write(json.dumps(record) + "\n")
            left = (time.perf_counter() - began) / count * (len(missing) - count)
            print(
                f"{count}/{len(missing)} {record['part']} {record['data']} {record['method']} "
                f"{record['seed']}, {left / 60:.0f} min left",
                flush=True,
            )

    @staticmethod
    def _records(missing: list[Job], folder: str, workers: int):
        if workers <= 1:
            yield from (run_job(job, folder) for job in missing)
            return
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            for future in as_completed([pool.submit(run_job, job, folder) for job in missing]):
                yield future.result()
