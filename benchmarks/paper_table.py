"""The comparison of the paper on the shipped data, and on real CLIP pairs where they are present; several seeds.

python benchmarks/paper_table.py                 # tables and sweeps, on two cores
python benchmarks/paper_table.py --quick         # a few methods, two seeds, no sweeps
python benchmarks/paper_table.py --part pictures # images of a few methods, by the shipped decoder
python benchmarks/paper_table.py --write-page    # the tables and the figure of the docs from the results

All methods get the recipe and budget of one configuration file: steps, batch, optimizer, adapter. Results are kept in
OUTPUT/results.jsonl as they come, with the commit and a hash of the assets; an interrupted run goes on where it
stopped.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from study.data import ROOT, available
from study.jobs import Results, sweep_jobs, table_jobs
from study.methods import QUICK, SWEEPS, TABLE
from study.report import blocks, fill, plot

PAGES = [ROOT / f"docs/{name}.md" for name in ("results", "results-tables")]
FIGURE, KEPT = ROOT / "docs/figures/results.png", ROOT / "benchmarks/results"
SMOKE = ["real", "raw_text", "ridge", "eclipse", "default", "half_unpaired"]


def write_page(records: list[dict], pictures: Path) -> None:
    """Fill the pages' tables, draw the figure, keep the numbers."""
    parts = blocks(records)
    if pictures.is_file():
        from study.pictures import picture_table

        parts["pictures"] = picture_table(pictures)
    for page in PAGES:
        page.write_text(fill(page.read_text(), parts))
    plot(records, FIGURE)
    KEPT.mkdir(exist_ok=True)
    lines = sorted(json.dumps(record, sort_keys=True) for record in records)
    (KEPT / "study.jsonl").write_text("\n".join(lines) + "\n")
    if pictures.is_file():
        # Paths are of the folder that it ran in.
        (KEPT / "pictures.json").write_text(pictures.read_text().replace(f"{ROOT}/", ""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "runs/study", help="where results are kept")
    parser.add_argument("--part", nargs="*", choices=("table", "sweeps", "pictures"), default=("table", "sweeps"))
    parser.add_argument("--methods", nargs="*", choices=tuple(TABLE), help="of the table (default all)")
    parser.add_argument("--sweeps", nargs="*", choices=tuple(SWEEPS), default=("choice", "unpaired"))
    parser.add_argument("--data", nargs="*", choices=("shipped", "few", "coco500"), default=available())
    parser.add_argument("--seeds", type=int, help="of the first table (default 5); the rest takes three fifths")
    parser.add_argument("--quick", action="store_true", help="the methods of the page's first table, two seeds")
    parser.add_argument("--steps", type=int, help="optimizer steps in place of the recipes'")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--pictures", type=int, default=300, help="prompts drawn by each method")
    parser.add_argument("--write-page", action="store_true", help="only write the docs from what there is")
    parser.add_argument("--smoke", action="store_true", help="a few methods on small random pairs, in seconds")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    results = Results(arguments.output / "results.jsonl")
    pictures = arguments.output / "pictures.json"
    if arguments.write_page:
        write_page(results.records, pictures)
        return
    began = time.perf_counter()
    seeds = arguments.seeds or (2 if arguments.quick or arguments.smoke else 5)
    methods = arguments.methods or list(QUICK if arguments.quick else TABLE)
    jobs = []
    if arguments.smoke:
        jobs = table_jobs(["random"], SMOKE, seeds, 4)
    elif "table" in arguments.part:
        jobs += table_jobs(arguments.data, methods, seeds, arguments.steps)
    if "sweeps" in arguments.part and not arguments.quick and not arguments.smoke:
        jobs += sweep_jobs(arguments.data, list(arguments.sweeps), max(1, seeds * 3 // 5), arguments.steps)
    if "shipped" in {job.data for job in jobs}:
        from study.data import SPLITS, shipped

        for split in SPLITS:
            shipped(split, arguments.output)
    if jobs:
        results.run(jobs, arguments.output, 1 if arguments.smoke else arguments.workers)
        print("\n\n".join(f"{name}\n\n{text}" for name, text in blocks(results.records).items()))
    if "pictures" in arguments.part:
        from study.pictures import draw

        pictures.write_text(json.dumps(draw(arguments.output, arguments.pictures), indent=1))
    print(f"{(time.perf_counter() - began) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
