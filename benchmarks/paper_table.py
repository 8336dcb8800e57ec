"""The comparison of the paper on the shipped data, and on real CLIP pairs where they are present; several seeds.

python benchmarks/paper_table.py                 # tables and sweeps, in under an hour on two cores
python benchmarks/paper_table.py --full          # more seeds
python benchmarks/paper_table.py --part pictures # pictures of a few methods, by the shipped decoder
python benchmarks/paper_table.py --write-page    # docs/results.md and its plots from the results

All methods get the recipe and budget of one configuration file: steps, batch, optimizer, adapter. Results are kept in
OUTPUT/results.jsonl as they come; an interrupted run goes on where it stopped.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from study.data import ROOT, available
from study.jobs import Results, sweep_jobs, table_jobs
from study.methods import SWEEPS, TABLE
from study.report import blocks, fill, plot

PAGE, FIGURES, KEPT = ROOT / "docs/results.md", ROOT / "docs/figures", ROOT / "benchmarks/results"


def write_page(records: list[dict], pictures: dict | None) -> None:
    """Fill the page's tables, draw its plots, keep the numbers."""
    parts = blocks(records)
    if pictures:
        from study.pictures import picture_table

        parts["pictures"] = picture_table(pictures)
    PAGE.write_text(fill(PAGE.read_text(), parts))
    for part in SWEEPS:
        if any(record["part"] == part for record in records):
            plot(records, part, FIGURES / f"results_{part}.png")
    KEPT.mkdir(exist_ok=True)
    lines = sorted(json.dumps(record, sort_keys=True) for record in records)
    (KEPT / "study.jsonl").write_text("\n".join(lines) + "\n")
    if pictures:
        # Paths are of the folder that it ran in.
        (KEPT / "pictures.json").write_text(json.dumps(pictures, indent=1).replace(f"{ROOT}/", "") + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "runs/study", help="where results are kept")
    parser.add_argument("--part", nargs="*", choices=("table", "sweeps", "pictures"), default=("table", "sweeps"))
    parser.add_argument("--methods", nargs="*", choices=tuple(TABLE), default=tuple(TABLE), help="of the table")
    parser.add_argument("--sweeps", nargs="*", choices=tuple(SWEEPS), default=tuple(SWEEPS))
    parser.add_argument("--data", nargs="*", choices=("shipped", "coco500"), default=available())
    parser.add_argument(
        "--seeds", type=int, help="of the table (default 5, of the tokens 3; --full 10); sweeps take three fifths"
    )
    parser.add_argument("--full", action="store_true", help="10 seeds and more pictures")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--pictures", type=int, help="prompts drawn by each method (default 60, --full all)")
    parser.add_argument("--write-page", action="store_true", help="only write docs/results.md from what there is")
    parser.add_argument("--smoke", action="store_true", help="a few methods on small random pairs, in seconds")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    results = Results(arguments.output / "results.jsonl")
    picture_file = arguments.output / "pictures.json"
    if arguments.write_page:
        pictures = json.loads(picture_file.read_text()) if picture_file.is_file() else None
        write_page(results.records, pictures)
        return
    began = time.perf_counter()
    if arguments.smoke:
        chosen = ["real", "raw_text", "ridge", "eclipse", "cs_aligner", "half_unpaired"]
        results.run(table_jobs(["random"], chosen, 2, 4), arguments.output, 1)
        print("\n\n".join(blocks(results.records).values()))
        return
    seeds = arguments.seeds or (10 if arguments.full else 5)
    jobs = []
    if "table" in arguments.part:
        within_the_hour = arguments.seeds is None and not arguments.full
        jobs += table_jobs(arguments.data, list(arguments.methods), seeds, None, within_the_hour)
    if "sweeps" in arguments.part:
        jobs += sweep_jobs(arguments.data, list(arguments.sweeps), max(1, seeds * 3 // 5), None)
    if jobs:
        if "shipped" in arguments.data:
            from study.data import shipped

            shipped(arguments.output)
        results.run(jobs, arguments.output, arguments.workers)
        print("\n\n".join(f"{name}\n\n{text}" for name, text in blocks(results.records).items()))
    if "pictures" in arguments.part:
        from study.pictures import draw

        count = arguments.pictures or (None if arguments.full else 60)
        picture_file.write_text(json.dumps(draw(arguments.output, count), indent=1))
    print(f"{(time.perf_counter() - began) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
