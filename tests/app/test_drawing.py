"""What one press of the button does: the images of `csdiff generate`, alone or beside others, until stopped."""

import json
import shutil
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import gradio as gr
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipelines import save_decoder

from csdiff.adapters import build_adapter
from csdiff.app.drawing import LARGEST_SIDE, Drawn, blend, check, create, from_record, read_upload, to_record
from csdiff.app.page import Fields, sampling_of
from csdiff.app.press import Note, Progress, Stopped, failure, status, stream
from csdiff.errors import CSDiffError
from csdiff.pipelines import generate, read_settings
from csdiff.resources import assets_dir


def asked(models, prompt="a red apple", *args, **settings):
    return check(models.options(*args, prompt=[prompt], **settings))


def run(models, config, compare=False) -> list:
    messages: list = []
    create(models, config, compare, messages.append)
    return messages


def test_what_the_decoder_does_not_read_is_refused_before_the_line(models, tiny_clip, tmp_path):
    decoder = save_decoder("UnCLIPPipeline", tiny_clip, tmp_path / "decoder")["decoder"]
    with pytest.raises(CSDiffError, match="Karlo takes no negative prompt"):
        asked(models, "a red apple", "none", str(decoder), negative_prompt="blurry")


def images(messages, place="images") -> list[bytes]:
    """Of the finished images; previews come before them as images."""
    paths = [m.image for m in messages if isinstance(m, Drawn) and m.place == place and isinstance(m.image, str)]
    return [Image.open(path).tobytes() for path in paths]


def test_same_images_as_the_command_line(models, tmp_path):
    config = asked(models, negative_prompt="blue", seed=5, num_images=2, steps=2, guidance=2.0)
    messages = run(models, config, compare=True)
    config.grid = config.progress = False
    for adapter, place in ((None, "images"), ("none", "raw")):
        config.adapter, config.output = adapter, str(tmp_path / place)
        expected = [Image.open(path).tobytes() for path in generate(config)]
        assert images(messages, place) == (expected if place == "images" else expected[:1])
    raw, ridge, adapter = (images(messages, place)[0] for place in ("raw", "ridge", "adapter"))
    assert adapter == images(messages)[0]
    assert len({raw, ridge, adapter}) == 3
    shares = [m.done / m.total for m in messages if isinstance(m, Progress) and m.total]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    said = [m.text for m in messages if isinstance(m, Progress)]
    assert any("left" in text for text in said)
    assert any(text.startswith("Image 2 of 2, step 2") for text in said)
    assert any(text.startswith("To compare: raw text") for text in said)
    assert not any("of 4" in text for text in said)


def test_without_an_adapter_the_raw_text_is_drawn_once(models):
    messages = run(models, asked(models, "a red apple", "none", steps=1), compare=True)
    shown = [(m.place, m.caption) for m in messages if isinstance(m, Drawn) and m.place != "images"]
    assert shown == [("adapter", "Raw text"), ("ridge", "Ridge, fitted to the shipped training images")]


def test_those_who_wait_are_served_in_their_order_and_not_too_many(models):
    waiting, order = threading.Event(), []

    def second():
        with models.turn(lambda progress: waiting.set()):
            order.append(2)

    with models.turn(print):
        thread = threading.Thread(target=second)
        thread.start()
        assert waiting.wait(60)
        models.config.max_waiting, most = 1, models.config.max_waiting
        with pytest.raises(CSDiffError, match="1 presses of the button wait already"), models.turn(print):
            order.append(3)
        models.config.max_waiting = most
        order.append(1)
    thread.join()
    assert order == [1, 2]


def test_the_ridge_map_of_an_adapter_for_other_encoders_is_fitted_to_its_training_store(
    models, tiny_clip, tiny_decoder, plain_store, tmp_path
):
    adapter = build_adapter("mlp", embedding_dim=16, text_dim=16)
    adapter.metadata = {f"{tower}_encoder": {"id": str(tiny_clip)} for tower in ("text", "image")}
    for data, known in (({"train": str(plain_store)}, True), ({"train": "gone"}, False)):
        adapter.metadata["data"] = data
        adapter.save_pretrained(tmp_path / "adapter")
        config = asked(models, "red", str(tmp_path / "adapter"), str(tiny_decoder), steps=2, height=32, width=32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a store and a decoder that do not say where they come from
            messages = run(models, config, compare=True)
        assert len(images(messages, "ridge")) == known
        assert images(messages, "ridge") != images(messages, "raw")
        assert known != any("not on this machine" in m.text for m in messages if isinstance(m, Note))


def test_two_at_once_do_not_mix(models):
    wanted = [asked(models, seed=1, steps=3), asked(models, "a yellow duck", seed=2, steps=4, guidance=1.0)]
    alone = [images(run(models, config)) for config in wanted]
    with ThreadPoolExecutor(2) as pool:
        assert [images(messages) for messages in pool.map(lambda config: run(models, config), wanted)] == alone


def test_stopping_ends_the_drawing_and_frees_the_models(models):
    ended = threading.Event()

    def work(report):
        try:
            create(models, asked(models, steps=50), False, report)
        except Stopped:
            ended.set()

    messages = stream(work)
    assert any(isinstance(message, Progress) and message.done == 2 for message in messages)
    messages.close()
    assert ended.wait(60)
    assert len(images(run(models, asked(models, steps=1)))) == 1


def test_errors_of_the_work_reach_the_page():
    def work(report):
        report(1)
        raise CSDiffError("no")

    messages = stream(work)
    assert next(messages) == 1
    with pytest.raises(CSDiffError, match="no"):
        next(messages)


def test_what_stands_under_the_button_is_text():
    assert "value=1 max=4" in status(Progress("<b>", 1, 4))
    assert "give “Guidance”, or --dtype" in failure("give --guidance, or --dtype")
    for line in (status(Progress("<b>")), failure("<b>"), status("", ["<b>"])):
        assert "&lt;b&gt;" in line


def test_long_prompts_are_told_of(models):
    (note,) = [m.text for m in run(models, asked(models, "red " * 100, steps=1)) if isinstance(m, Note)]
    assert "this end is cut off" in note
    assert len(note) < 250


@pytest.mark.parametrize(
    ("prompt", "options", "said"),
    [
        ("", {}, "empty"),
        ("a", {"seed": -1}, "seed"),
        ("a", {"adapter": "/nowhere/at/all"}, "/nowhere/at/all"),
    ],
)
def test_bad_settings_are_one_sentence(models, prompt, options, said):
    with pytest.raises(CSDiffError, match=said):
        asked(models, prompt, **options)


def test_a_blend_goes_from_the_first_to_the_second(models):
    first, messages = asked(models, seed=3, steps=2), []
    blend(models, first, "a yellow duck", (0.0, 0.5, 1.0), messages.append)
    start, middle, end = images(messages)
    assert [start] == images(run(models, first))
    assert [end] == images(run(models, asked(models, "a yellow duck", seed=3, steps=2)))
    assert middle not in (start, end)
    messages.clear()
    blend(models, first, Image.new("RGB", (64, 64), "blue"), (0.0, 1.0), messages.append)
    blue = images(messages)
    assert blue[0] == start
    pixels = [torch.frombuffer(bytearray(image), dtype=torch.uint8).float() for image in blue]
    assert (pixels[0] - pixels[1]).abs().mean() > 1


def test_images_of_page_and_command_line_hold_the_settings_that_draw_them_again(models, tmp_path):
    config = asked(models, negative_prompt="blue", seed=7, steps=2, guidance=1.5)
    (drawn,) = [m for m in run(models, config) if isinstance(m, Drawn)]
    record = read_settings(drawn.image)
    assert "--seed 7" in record["command"]
    assert from_record(record) == to_record(config)
    config.output, config.progress = str(tmp_path), False
    (path,) = generate(config)
    record = read_settings(path)
    assert str(assets_dir()) not in json.dumps(record)
    assert from_record(record) == to_record(config)
    other = {"adapter": {"folder": "runs/mine"}, "decoder": {"source": "kandinsky22"}}
    assert from_record(record | other) == to_record(config) | {"adapter": "runs/mine", "decoder": "kandinsky22"}


def test_settings_from_anywhere_may_hold_anything():
    given = {"prompt": ["x"], "seed": "inf", "steps": "many", "guidance": "nan?", "num_images": 3.0}
    expected = {"prompt": "", "negative_prompt": "", "seed": 0, "num_images": 3}
    assert from_record({**given, "adapter": {"a": 1}}) == expected


@pytest.mark.parametrize(("steps", "guidance", "shown"), [(150, 20.0, (150, 20.0)), (900, 90.0, (200, 30.0))])
def test_sliders_take_what_any_decoder_is_made_for(models, tmp_path, steps, guidance, shown):
    """Gradio refuses a press of the button with a number beyond a slider's bounds."""
    decoder = shutil.copytree(assets_dir() / "decoder", tmp_path / "decoder")
    fingerprint = json.loads((decoder / "csdiff.json").read_text())
    fingerprint["sampling"] = {"steps": steps, "guidance": guidance}
    (decoder / "csdiff.json").write_text(json.dumps(fingerprint))
    with gr.Blocks():
        fields = Fields(models)
    assert sampling_of(models, str(decoder)) == shown
    assert (fields.steps.preprocess(shown[0]), fields.guidance.preprocess(shown[1])) == shown


def test_bad_uploads_are_a_sentence(tmp_path):
    (tmp_path / "upload.png").write_bytes(b"not an image")
    Image.effect_noise((64, 64), 50).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:1000])
    for name in ("cut.png", "upload.png"):
        with pytest.raises(CSDiffError, match=f"^{name} is damaged, or no image that csdiff reads") as error:
            read_upload(tmp_path / name)
    assert str(tmp_path) not in str(error.value)
    Image.new("1", (1, 101)).save(tmp_path / "long.png")
    with pytest.raises(CSDiffError, match=r"^long\.png: it has 1 x 101 pixels"):
        read_upload(tmp_path / "long.png")


def test_uploads_are_made_small_and_rgb(tmp_path):
    Image.fromarray(np.zeros((3000, 1500, 4), np.uint8)).save(tmp_path / "a.png")
    image = read_upload(tmp_path / "a.png")
    assert (image.mode, image.size) == ("RGB", (LARGEST_SIDE // 2, LARGEST_SIDE))
