"""The study script on small random pairs: it fits, measures, keeps its results and goes on from them."""

import json
import subprocess
import sys


def test_study_measures_every_method_and_goes_on_where_it_stopped(root, tmp_path):
    def smoke() -> str:
        command = [sys.executable, "benchmarks/paper_table.py", "--smoke", "--output", str(tmp_path)]
        return subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout

    assert "0 of 11 jobs are done" in smoke()
    file = tmp_path / "results.jsonl"
    lines = file.read_text().splitlines()
    records = {(r["method"], r["seed"]): r for r in map(json.loads, lines)}
    assert len(records) == 11
    gap = {m: records[m, 0]["held_out"]["test"]["centroid_gap"] for m in ("real", "raw_text", "ridge")}
    assert gap["ridge"] < gap["raw_text"] / 2
    assert gap["real"] < gap["raw_text"] / 2
    assert records["eclipse", 0]["parameters"] == records["default", 0]["parameters"] > 0

    file.write_text("\n".join(lines[:-2]) + "\n")
    shown = smoke()
    assert "9 of 11 jobs are done" in shown
    again = {(r["method"], r["seed"]): r for r in map(json.loads, file.read_text().splitlines())}
    assert again.keys() == records.keys()
    for key, record in records.items():
        found = again[key]["held_out"]["test"]["kernel_distance"]
        assert abs(found - record["held_out"]["test"]["kernel_distance"]) < 1e-6
    assert "**CS-Aligner, the default**" in shown
    assert all(len(r["assets"]) == 16 and r["commit"] for r in records.values())
