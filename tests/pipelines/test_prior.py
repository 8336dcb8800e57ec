"""`CSDiffPriorPipeline`, and the stock prior pipeline with an adapter in it."""

import inspect

import numpy as np
import pytest
import torch
from diffusers import KandinskyV22PriorPipeline, UnCLIPScheduler
from PIL import Image
from tiny_pipelines import DIM, PROMPT, build, clip_parts, prior_transformer

from csdiff import CSDiffError
from csdiff.pipelines import CSDiffPriorPipeline, OneShotScheduler

PROMPTS = ["a red apple", "a cat", "two blue boats"]


@pytest.fixture(scope="module")
def parts(tiny_clip):
    return clip_parts(tiny_clip)


@pytest.fixture
def pipe(parts, adapter):
    return CSDiffPriorPipeline(adapter, **parts)


@pytest.mark.parametrize("arguments", [{}, {"num_inference_steps": 1}, {"guidance_scale": 1.0}, {"guidance_scale": 7}])
@pytest.mark.parametrize("negative", [None, ["blurry", "grey", "dark"]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_stock_pipeline_gives_the_same_whatever_is_asked(
    arguments, negative, dtype, tiny_clip, adapter, embed, zero_image_embeds
):
    expected = embed(adapter, *PROMPTS)
    wanted = zero_image_embeds.expand(3, -1) if negative is None else embed(adapter, *negative)
    stock = KandinskyV22PriorPipeline(prior=adapter, scheduler=OneShotScheduler(), **clip_parts(tiny_clip)).to(dtype)
    output = stock(PROMPTS, negative, **arguments)
    room = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(output.image_embeds.float(), expected, atol=room, rtol=0)
    torch.testing.assert_close(output.negative_image_embeds.float(), wanted, atol=room, rtol=0)


def test_the_one_shot_scheduler_stands_in_for_that_of_diffusion_priors():
    scheduler, output, sample = OneShotScheduler(), torch.randn(2, 3) * 100, torch.randn(2, 3)
    scheduler.set_timesteps(25, device="cpu")
    assert scheduler.timesteps.tolist() == [0]
    assert scheduler.step(output, 0, sample, return_dict=False)[0] is output
    assert scheduler.scale_model_input(sample, 0) is sample
    theirs, ours = (inspect.signature(kind.step).parameters for kind in (UnCLIPScheduler, OneShotScheduler))
    assert theirs.keys() <= ours.keys()


def test_a_scheduler_for_diffusion_priors_is_warned_of_with_the_cure(parts, adapter):
    scheduler = UnCLIPScheduler(prediction_type="sample", clip_sample_range=0.1)
    stock = KandinskyV22PriorPipeline(prior=adapter, scheduler=scheduler, **parts)
    with pytest.warns(UserWarning, match=r"scheduler=OneShotScheduler\(\)"):
        stock(PROMPT)


@pytest.mark.parametrize("negative", ["blurry", ["blurry"], ["blurry", "grey", "dark"]])
def test_negative_prompts_become_negative_image_embeds(pipe, adapter, embed, negative):
    output = pipe(PROMPTS, negative_prompt=negative, num_images_per_prompt=2)
    texts = negative if len(negative) == 3 else ["blurry"] * 3
    for found, asked in ((output.negative_image_embeds, texts), (output.image_embeds, PROMPTS)):
        torch.testing.assert_close(found, embed(adapter, *asked).repeat_interleave(2, dim=0), atol=1e-5, rtol=0)


def test_special_tokens_and_half_characters_are_text(pipe, adapter, embed):
    prompts = ("a cat<|endoftext|> and a dog", "cut emoji \ud83d")
    image_embeds = pipe(prompts, negative_prompt=prompts).image_embeds
    torch.testing.assert_close(image_embeds, embed(adapter, *prompts), atol=1e-5, rtol=0)
    assert not torch.allclose(image_embeds[:1], embed(adapter, "a cat"), atol=1e-3)
    torch.testing.assert_close(image_embeds[1:], embed(adapter, "cut emoji \ufffd"), atol=1e-5, rtol=0)


def test_spread_varies_the_embedding_by_the_generator(pipe, adapter, embed):
    def draw(spread, seed=0, **options):
        generator = torch.Generator().manual_seed(seed)
        return pipe(PROMPT, num_images_per_prompt=2, generator=generator, spread=spread, **options)

    once, output = embed(adapter, PROMPT), draw(0.6, negative_prompt="blurry")
    torch.testing.assert_close(output.image_embeds, draw(0.6).image_embeds)
    assert not torch.equal(output.image_embeds, draw(0.6, seed=1).image_embeds)
    torch.testing.assert_close(output.negative_image_embeds[:1], embed(adapter, "blurry"), atol=1e-5, rtol=0)
    noise = torch.randn(2, DIM, generator=torch.Generator().manual_seed(0))
    expected = adapter.clip_mean + 0.8 * (once - adapter.clip_mean) + 0.6 * adapter.clip_std * noise
    torch.testing.assert_close(output.image_embeds, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(draw(0.0).image_embeds, once.expand(2, -1), atol=1e-5, rtol=0)
    # one generator for each row
    rows = [torch.Generator().manual_seed(seed) for seed in (0, 0, 1, 1)]
    rows = pipe([PROMPT, PROMPT], "blurry", num_images_per_prompt=2, generator=rows, spread=0.6).image_embeds
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[1], rows[2])


def test_dict_tuple_and_numpy_agree(pipe):
    output = pipe(PROMPT)
    image_embeds, negative_image_embeds = pipe(PROMPT, return_dict=False)
    assert torch.equal(output.image_embeds, image_embeds)
    assert torch.equal(output.negative_image_embeds, negative_image_embeds)
    array = pipe(PROMPT, output_type="np").image_embeds
    assert isinstance(array, np.ndarray)
    np.testing.assert_array_equal(array, image_embeds.numpy())


def test_callback_sees_and_may_replace_the_latents(pipe, adapter):
    seen = []

    def replace(pipeline, step, timestep, tensors):
        seen.append((step, int(timestep), sorted(tensors)))
        return {"latents": torch.zeros_like(tensors["latents"])}

    image_embeds = pipe(
        PROMPT, callback_on_step_end=replace, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"]
    ).image_embeds
    assert seen == [(0, 0, ["latents", "prompt_embeds"])]
    # whitened zeros are the mean of the image embeddings
    torch.testing.assert_close(image_embeds, adapter.clip_mean)


@pytest.mark.parametrize(("dtype", "variant"), [(torch.bfloat16, None), (torch.float16, "fp16")])
def test_half_precision_and_its_variant(tiny_clip, adapter, embed, tmp_path, dtype, variant):
    expected = embed(adapter, PROMPT)
    pipe = CSDiffPriorPipeline(adapter, **clip_parts(tiny_clip)).to(dtype)
    image_embeds = pipe(PROMPT, negative_prompt="blurry").image_embeds
    assert image_embeds.dtype == dtype
    assert torch.nn.functional.cosine_similarity(image_embeds.float(), expected) > 0.995
    pipe.save_pretrained(tmp_path, variant=variant)
    assert {".fp16." in file.name for file in tmp_path.rglob("*.safetensors")} == {variant is not None}
    reloaded = CSDiffPriorPipeline.from_pretrained(tmp_path, variant=variant, dtype=dtype)
    assert reloaded.prior.dtype == reloaded.text_encoder.dtype == dtype
    assert torch.equal(reloaded(PROMPT).image_embeds, pipe(PROMPT).image_embeds)


def test_model_offload_hooks_and_gives_the_same(tiny_clip, adapter, embed):
    pipe = CSDiffPriorPipeline(adapter, **clip_parts(tiny_clip))
    # the processor stands in for the accelerator: the hooks are the same, only the copies are free
    pipe.enable_model_cpu_offload(device="cpu")
    assert hasattr(pipe.prior, "_hf_hook")
    assert hasattr(pipe.text_encoder, "_hf_hook")
    for _ in range(2):
        torch.testing.assert_close(pipe(PROMPT).image_embeds, embed(adapter, PROMPT), atol=1e-5, rtol=0)
    pipe.interpolate([PROMPT, Image.new("RGB", (32, 32), "red")], [0.5, 0.5])


def test_compiled_prior_runs_saves_and_reloads(pipe, adapter, embed, tmp_path):
    pipe.prior = torch.compile(adapter, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(pipe(PROMPT).image_embeds, embed(adapter, PROMPT), atol=1e-5, rtol=0)
    pipe.save_pretrained(tmp_path)
    reloaded = CSDiffPriorPipeline.from_pretrained(tmp_path)
    assert type(reloaded.prior) is type(adapter)


def test_save_and_reload_the_whole_pipeline(pipe, adapter, tmp_path, caplog):
    before = pipe(PROMPT, negative_prompt="blurry")
    pipe.save_pretrained(tmp_path)
    for cls in (CSDiffPriorPipeline, KandinskyV22PriorPipeline):
        reloaded = cls.from_pretrained(tmp_path)
        after = reloaded(PROMPT, negative_prompt="blurry")
        torch.testing.assert_close(before.image_embeds, after.image_embeds)
        torch.testing.assert_close(before.negative_image_embeds, after.negative_image_embeds)
        assert isinstance(reloaded.scheduler, OneShotScheduler)
    assert reloaded.prior.metadata["text_encoder"] == adapter.metadata["text_encoder"]
    assert not [record for record in caplog.records if "Expected types" in record.getMessage()]


def test_a_stock_folder_with_an_adapter_gets_the_one_shot_scheduler(tiny_clip, adapter, embed, tmp_path):
    build("KandinskyV22PriorPipeline", tiny_clip).save_pretrained(tmp_path)
    pipe = CSDiffPriorPipeline.from_pretrained(tmp_path, prior=adapter)
    torch.testing.assert_close(pipe(PROMPT).image_embeds, embed(adapter, PROMPT), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("place", "said"), [(".", "holds a.png"), ("nowhere", "does not exist"), ("./x/y", "x/y")])
def test_what_is_neither_a_pipeline_nor_an_adapter(tmp_path, place, said):
    (tmp_path / "a.png").touch()
    with pytest.raises(CSDiffError, match=said):
        CSDiffPriorPipeline.from_pretrained(tmp_path / place)


def test_without_an_image_encoder_and_a_scheduler(parts, adapter, embed, tmp_path):
    pipe = CSDiffPriorPipeline(adapter, parts["text_encoder"], parts["tokenizer"], scheduler=None)
    pipe.save_pretrained(tmp_path)
    for prior in (pipe, CSDiffPriorPipeline.from_pretrained(tmp_path)):
        output = prior(PROMPTS[:2])
        torch.testing.assert_close(output.image_embeds, embed(adapter, *PROMPTS[:2]), atol=1e-5, rtol=0)
        torch.testing.assert_close(output.negative_image_embeds, embed(adapter, "", ""), atol=1e-5, rtol=0)
        assert not any(getattr(prior, component) for component in prior._optional_components)
    with pytest.raises(CSDiffError, match="image tower"):
        pipe.interpolate([Image.new("RGB", (32, 32))], [1.0])


def test_interpolate_mixes_prompts_and_pictures(pipe, adapter, encoders, embed, zero_image_embeds):
    picture = Image.new("RGB", (48, 40), "red")
    pixels = torch.randn(1, 3, 32, 32)
    output = pipe.interpolate(["a cat", picture, pixels], [0.5, 0.2, 0.3], num_images_per_prompt=2)
    with torch.no_grad():
        images = 0.2 * encoders["image"].encode([picture]).embeds + 0.3 * encoders["image"].forward(pixels).embeds
    expected = 0.5 * embed(adapter, "a cat") + images
    torch.testing.assert_close(output.image_embeds, expected.repeat(2, 1), atol=1e-4, rtol=0)
    torch.testing.assert_close(output.negative_image_embeds, zero_image_embeds.repeat(2, 1), atol=1e-5, rtol=0)
    named = pipe.interpolate(["a cat"], [1.0], negative_prompt="blurry")
    torch.testing.assert_close(named.negative_image_embeds, embed(adapter, "blurry"), atol=1e-5, rtol=0)


def test_a_diffusion_prior_keeps_its_scheduler_and_steps(parts, tiny_clip):
    scheduler = UnCLIPScheduler(prediction_type="sample", clip_sample_range=5.0)
    prior = prior_transformer(tiny_clip)
    torch.nn.init.ones_(prior.clip_std)
    pipe = CSDiffPriorPipeline(prior, **parts, scheduler=scheduler)
    seeded = [
        pipe(PROMPT, num_inference_steps=3, generator=torch.Generator().manual_seed(s)).image_embeds for s in (0, 0, 1)
    ]
    assert pipe.num_timesteps == 3
    assert torch.equal(seeded[0], seeded[1])
    assert not torch.equal(seeded[0], seeded[2])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prompt": []}, "prompt: expected a string or a list"),
        ({"prompt": 3}, "found 3"),
        ({"prompt": PROMPTS, "negative_prompt": ["a", "b"]}, "one for each of 3 prompts.* found .*2 negatives"),
        ({"prompt": PROMPTS, "generator": [torch.Generator()]}, "a list of 3, found .*1 generators"),
        ({"prompt": PROMPT, "num_images_per_prompt": 0}, "num_images_per_prompt of 1 or more.* found 0"),
        ({"prompt": PROMPT, "spread": 1.5}, "1.5"),
    ],
)
def test_bad_arguments_are_named(pipe, arguments, words):
    with pytest.raises(CSDiffError, match=words):
        pipe(**arguments)
