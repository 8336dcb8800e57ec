"""What one press of the button does: the pictures of `csdiff generate`, alone or beside others, until stopped."""

import threading

import pytest
import torch
from PIL import Image

from csdiff.app.drawing import Drawn, Note, Settings, Started, blend, create, from_mapping, settings_of
from csdiff.app.work import Line, Progress, Stopped, stream
from csdiff.errors import CSDiffError
from csdiff.pipelines import GenerateConfig, generate
from csdiff.pipelines.generate import read_settings


def pictures(messages, place="images") -> list[bytes]:
    return [Image.open(m.path).tobytes() for m in messages if isinstance(m, Drawn) and m.place == place]


def run(models, settings, compare=False) -> list:
    messages: list = []
    create(models, settings, compare, messages.append)
    return messages


def test_same_pictures_as_the_command_line(models, tmp_path):
    settings = Settings("a red apple", negative="blue", seed=5, count=2, steps=2, guidance=2.0)
    messages = run(models, settings, compare=True)
    config = GenerateConfig(
        prompt=["a red apple"], negative_prompt="blue", seed=5, num_images=2, steps=2, guidance=2.0, grid=False
    )
    for adapter, place in ((None, "images"), ("none", "raw")):
        config.adapter, config.output = adapter, str(tmp_path / place)
        config.device, config.progress = "cpu", False
        expected = [Image.open(path).tobytes() for path in generate(config)]
        assert pictures(messages, place) == (expected if place == "images" else expected[:1])
    raw, ridge, adapter = (pictures(messages, place)[0] for place in ("raw", "ridge", "adapter"))
    assert adapter == pictures(messages)[0]
    assert len({raw, ridge, adapter}) == 3
    drawn = next(m for m in messages if isinstance(m, Drawn))
    assert "--seed 5" in read_settings(drawn.path)["command"]
    shares = [m.done / m.total for m in messages if isinstance(m, Progress) and m.total]
    assert shares == sorted(shares)
    assert shares[-1] == 1


def test_two_at_once_do_not_mix(models):
    wanted = [Settings("a red apple", seed=1, steps=3), Settings("a yellow duck", seed=2, steps=4, guidance=1.0)]
    alone = [pictures(run(models, settings)) for settings in wanted]
    together: list = [None, None]

    def work(index):
        together[index] = pictures(run(models, wanted[index]))

    threads = [threading.Thread(target=work, args=[index]) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_stopping_ends_the_drawing_and_frees_the_models(models):
    reached = []

    def work(report):
        try:
            create(models, Settings("a red apple", steps=50), False, report)
        except Stopped:
            reached.append("stopped")
            raise

    messages = stream(work)
    for message in messages:
        if isinstance(message, Progress) and message.done == 2:
            break
    messages.close()
    assert reached == ["stopped"]
    assert len(pictures(run(models, Settings("a red apple", steps=1)))) == 1


def test_work_ends_at_the_report_after_stop():
    done = []

    def work(report):
        for number in range(5):
            report(number)
            done.append(number)

    messages = stream(work, lambda: len(done) == 2)
    assert [next(messages), next(messages)] == [0, 1]
    with pytest.raises(Stopped):
        next(messages)
    assert done == [0, 1]


def test_errors_of_the_work_reach_the_page():
    def work(report):
        report(1)
        raise CSDiffError("no")

    messages = stream(work)
    assert next(messages) == 1
    with pytest.raises(CSDiffError, match="no"):
        next(messages)


def test_long_prompts_are_told_of(models):
    notes = [m.text for m in run(models, Settings("red " * 100, steps=1)) if isinstance(m, Note)]
    assert len(notes) == 1
    assert "reads the first" in notes[0]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (Settings(" "), "empty"),
        (Settings("a", count=99), "1 to 8 images"),
        (Settings("a", steps=100_000), "1 to 200 steps"),
        (Settings("a", steps=0), "1 to 200 steps"),
        (Settings("a" * 3000), "at most 2000 characters"),
        (Settings("a", seed=-1), "seed"),
        (Settings("a", adapter="/nowhere/at/all"), "/nowhere/at/all"),
        (Settings("a", decoder="nothing"), "expected a preset"),
    ],
)
def test_bad_settings_are_one_sentence_before_anything_is_drawn(models, settings, said):
    messages: list = []
    with pytest.raises(CSDiffError, match=said):
        create(models, settings, False, messages.append)
    assert not any(isinstance(m, (Drawn, Started)) for m in messages)


def test_blend_ends_are_the_prompts(models):
    first, second = Settings("a red apple", seed=3, steps=2), Settings("a yellow duck", seed=3, steps=2)
    messages: list = []
    blend(models, first, "a yellow duck", (0.0, 0.5, 1.0), messages.append)
    start, middle, end = pictures(messages)
    assert [start] == pictures(run(models, first))
    assert [end] == pictures(run(models, second))
    assert middle not in (start, end)


def test_blend_with_a_picture_moves_towards_it(models, root):
    picture = Image.new("RGB", (64, 64), "blue")
    messages: list = []
    blend(models, Settings("a red apple", steps=2), picture, (0.0, 1.0), messages.append)
    start, end = (torch.frombuffer(bytearray(p), dtype=torch.uint8).view(-1, 3).float() for p in pictures(messages))
    assert (start - end).abs().mean() > 1


@pytest.mark.parametrize(("first", "second"), [("", "a duck"), ("a duck", " ")])
def test_blend_needs_both(models, first, second):
    with pytest.raises(CSDiffError, match="is empty"):
        blend(models, Settings(first), second, (0.5,), print)


def test_an_image_holds_the_settings_that_draw_it_again(models):
    asked = Settings("a red apple", negative="blue", seed=7, steps=2, guidance=1.5, decoder="tiny")
    (drawn,) = [m for m in run(models, asked) if isinstance(m, Drawn)]
    assert settings_of(drawn.path) == asked


def test_images_of_the_command_line_bring_their_settings(models, tmp_path):
    config = GenerateConfig(
        prompt=["a red apple"], negative_prompt="blue", seed=7, steps=2, device="cpu", progress=False
    )
    config.output = str(tmp_path)
    (path,) = generate(config)
    found = settings_of(str(path))
    assert (found.prompt, found.negative, found.seed, found.steps) == ("a red apple", "blue", 7, 2)


def test_an_image_without_settings_is_a_sentence(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    with pytest.raises(CSDiffError, match=r"no settings in .*photo\.png"):
        settings_of(str(tmp_path / "photo.png"))


def test_settings_from_anywhere_may_hold_anything():
    given = {"prompt": ["x"], "seed": "-4", "steps": "many", "guidance": "nan?", "count": 3.0, "adapter": {"a": 1}}
    assert from_mapping(given) == Settings(count=3)


def test_those_in_line_are_told_their_place_and_the_time_left():
    line, said = Line(most=1), []
    with line.turn(print, steps=10) as count:
        assert count(1) == ""
        assert "left" in count(4)

        def hear(message):
            said.append(message.text)
            raise InterruptedError

        with pytest.raises(InterruptedError), line.turn(hear, steps=3):
            pass
        assert said[0].startswith("Waiting: 1 before you, about ")
    with line.turn(print):
        pass


def test_a_full_line_is_refused():
    line = Line(most=0)
    with line.turn(print), pytest.raises(CSDiffError, match="wait already"), line.turn(print):
        pass
