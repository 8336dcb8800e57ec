"""One job is one method, fitted with one seed on one data set and measured; finished jobs are kept in a file."""

import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from .methods import SWEEPS, TABLE, Method

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
    def key(self) -> str:
        """Names the job in the results file."""
        return json.dumps(asdict(self), sort_keys=True)

    @property
    def spec(self) -> Method:
        """The method's definition."""
        return TABLE[self.method] if self.part == "table" else SWEEPS[self.part][self.method]


def table_jobs(
    data: list[str], methods: list[str], seeds: int, steps: int | None, within_the_hour: bool = False
) -> list[Job]:
    """Every method with every seed, seed after seed, so that half a run is a whole table."""
    chosen = [
        Job("table", name, method, seed, steps)
        for seed in range(seeds)
        for name in data
        for method in methods
        if TABLE[method].only in (None, name)
        and (name == "shipped" or not (TABLE[method].encoder or TABLE[method].tokens))
        and not (within_the_hour and seed >= (TABLE[method].most_seeds or seeds))
    ]
    return sorted(chosen, key=lambda job: (job.seed, job.method not in CHEAP, job.spec.encoder or job.spec.tokens))


def sweep_jobs(data: list[str], parts: list[str], seeds: int, steps: int | None) -> list[Job]:
    """Every setting of every sweep, measured on validation rows."""
    return [
        Job(part, name, method, seed, steps)
        for seed in range(seeds)
        for part in parts
        for name in data
        for method in SWEEPS[part]
        if not (name != "shipped" and part in ("batch", "unpaired"))
    ]


@lru_cache(maxsize=2)
def _study(name: str, seed: int, folder: str, validation: bool):
    from .data import load

    return load(name, seed, Path(folder), validation)


def run_job(job: Job, folder: str) -> dict:
    """Fit and measure; a record for the results file."""
    import torch

    from csdiff.evaluation.embedding_metrics import embedding_metrics

    from .fit import fit, predict, recipe

    torch.set_num_threads(1)
    validation = job.part != "table"
    # Only coco500 draws its rows by the seed.
    study = _study(job.data, job.seed if job.data != "shipped" else 0, folder, validation)
    config = recipe(study.config)
    if job.steps is not None:
        config.max_steps = job.steps
    record = {**asdict(job), "held_out": {}}
    if job.spec.adapter != "real":
        fitted = fit(job.spec, study.fit, config, job.seed)
        record |= {"train_seconds": fitted.seconds, "parameters": fitted.parameters}
    for split, rows in study.held_out.items():
        start = time.process_time()
        if job.spec.adapter == "real":
            # Other real pictures in the place of predictions: only the distances between distributions mean something.
            others, generator = study.fit.distinct, torch.Generator().manual_seed(job.seed)
            prediction = others[torch.randperm(len(others), generator=generator)[: len(rows)]]
        else:
            prediction = predict(fitted.adapter, rows)
        seconds = time.process_time() - start
        metrics = embedding_metrics(prediction, rows.image, rows.text, rows.ids)
        record["held_out"][split] = {**metrics, "inference_ms": 1e6 * seconds / len(rows)}
    return record


class Results:
    """Finished jobs, one JSON object a line; an interrupted run goes on with the others.

    Args:
        file: Where they are kept.
    """

    def __init__(self, file: Path):
        self.file = file
        lines = file.read_text().splitlines() if file.is_file() else []
        self.records = [json.loads(line) for line in lines if line.endswith("}")]

    def missing(self, jobs: list[Job]) -> list[Job]:
        """Those of the jobs that are not done."""
        done = {
            json.dumps({k: r[k] for k in ("part", "data", "method", "seed", "steps")}, sort_keys=True)
            for r in self.records
        }
        return [job for job in jobs if job.key not in done]

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
