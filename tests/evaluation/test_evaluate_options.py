"""Options of `csdiff evaluate` that can be no good are refused in one sentence, before any work."""

import pytest
from PIL import Image

from csdiff.cli import run_command
from csdiff.errors import CSDiffError
from csdiff.evaluation import EvaluateConfig, evaluate
from csdiff.evaluation.drawing import Job, PictureFolder


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("steps", "0", "steps"),
        ("steps", "1001", "steps"),
        ("seed", "-1", "0"),
        ("seed", "99999999999999999999", "2^63"),
        ("size", "12", "8"),
        ("max_rows", "3", "8"),
        ("picture_baselines", "magic", "mean_shift"),
        ("device", "foo", "cpu"),
    ],
)
def test_a_bad_option_is_named(capsys, option, value, expected):
    assert run_command("evaluate", ["--data", "nowhere", f"--{option}", value], "csdiff evaluate") == 2
    said = capsys.readouterr().err
    assert len(said.strip().splitlines()) == 1
    for part in (option, value, expected):
        assert part in said
    if option not in ("device", "picture_baselines"):
        with pytest.raises(CSDiffError, match=option):
            evaluate(EvaluateConfig(data="nowhere", **{option: int(value)}))


def test_a_damaged_picture_is_named(tmp_path):
    folder, job = PictureFolder(tmp_path, "adapter", {}), Job("a cat", row=0, key="a-cat-0")
    folder.write(job, Image.new("RGB", (32, 32), "red"))
    assert folder.read(job).getpixel((0, 0)) == (255, 0, 0)
    folder.file(job).write_bytes(folder.file(job).read_bytes()[:40])
    with pytest.raises(CSDiffError, match=r"a-cat-0\.png: expected a drawn picture"):
        folder.read(job)
