"""Options of `csdiff evaluate` that can be no good are refused in one sentence, before any work."""

import pytest
from PIL import Image

from csdiff.cli import run_command
from csdiff.errors import CSDiffError
from csdiff.evaluation.drawing import Job, PictureFolder


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("steps", "0", "at least 1"),
        ("steps", "1001", "at most 1000"),
        ("seed", "-1", "from 0 to"),
        ("seed", "99999999999999999999", "from 0 to"),
        ("device", "foo", "--device cpu"),
    ],
)
def test_a_bad_option_is_named(capsys, option, value, expected):
    assert run_command("evaluate", ["--data", "nowhere", f"--{option}", value], "csdiff evaluate") == 2
    said = capsys.readouterr().err
    assert f"{option}: expected" in said
    assert expected in said


def test_a_damaged_picture_is_named(tmp_path):
    folder, job = PictureFolder(tmp_path, "adapter", {}), Job("a cat", row=0, image=0, key="a-cat-0")
    folder.write(job, Image.new("RGB", (32, 32), "red"))
    assert folder.read(job).getpixel((0, 0)) == (255, 0, 0)
    folder.file(job).write_bytes(folder.file(job).read_bytes()[:40])
    with pytest.raises(CSDiffError, match=r"a-cat-0\.png: expected a drawn picture"):
        folder.read(job)
