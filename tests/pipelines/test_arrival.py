"""Adapters and unmodified diffusers pipelines: the embedding that arrives in the decoder is the adapter's."""

import pytest
import torch
from diffusers import AutoPipelineForImage2Image, AutoPipelineForText2Image, PriorTransformer, StableUnCLIPPipeline
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from tiny_pipelines import (
    CALLS,
    DIM,
    PROMPT,
    build,
    clip_parts,
    ip_adapter_weights,
    karlo_folder,
    prior_transformer,
)

import csdiff
from csdiff import CSDiffError
from csdiff.pipelines import (
    CSDiffPriorPipeline,
    EmbeddingPrior,
    OneShotScheduler,
    ip_adapter_arguments,
    ip_adapter_image_embeds,
    load_karlo,
)

SMALL = {"height": 64, "width": 64, "num_inference_steps": 2}
KARLO = {"decoder_num_inference_steps": 2, "super_res_num_inference_steps": 2}
COMBINED = [name for name in CALLS if "Combined" in name]
STABLE = [name for name in CALLS if "Diffusion" in name or "Animate" in name]
FLUX = [name for name in CALLS if "Flux" in name]


def seen(pipe, **arguments) -> list[torch.Tensor]:
    """Runs a pipeline; returns the image embeddings that its decoder was given, call by call."""
    rows, name = [], type(pipe).__name__
    if "Kandinsky" in name:
        part, pick = pipe.unet, lambda args, given: given["added_cond_kwargs"]["image_embeds"]
    elif "StableUnCLIP" in name:
        # the other half is the embedded noise level
        part, pick = pipe.unet, lambda args, given: given["class_labels"][:, :DIM]
    elif "UnCLIP" in name:
        part, pick = pipe.text_proj, lambda args, given: given["image_embeddings"]
    elif "Cascade" in name:
        part, pick = pipe.prior.clip_img_mapper, lambda args, given: args[0].flatten(0, 1)
    else:
        model = getattr(pipe, "unet", None) or pipe.transformer
        part, pick = model.encoder_hid_proj.image_projection_layers[0], lambda args, given: args[0].reshape(-1, DIM)
    hook = part.register_forward_pre_hook(lambda _, *given: rows.append(pick(*given)), with_kwargs=True)
    try:
        pipe(**{"output_type": "np", **(KARLO if name == "UnCLIPPipeline" else SMALL), **arguments})
    finally:
        hook.remove()
    return rows


def assert_near(found: torch.Tensor, *expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def pipes(tiny_clip, tmp_path_factory):
    """`pipes(name)`: a pipeline with an IP-Adapter, made once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = build(name, tiny_clip)
            path = ip_adapter_weights(tmp_path_factory.mktemp("ip-adapter"), made[name])
            tower = "image_encoder_pretrained_model_name_or_path" if "Flux" in name else "image_encoder_folder"
            made[name].load_ip_adapter(str(path.parent), subfolder="", weight_name=path.name, **{tower: None})
        return made[name]

    return get


@pytest.mark.parametrize("name", [name for name in CALLS if "Kandinsky" in name and name not in COMBINED])
def test_every_kandinsky_decoder_takes_the_output_of_the_prior(name, tiny_clip, adapter, embed):
    prior = CSDiffPriorPipeline(adapter, **clip_parts(tiny_clip))
    rows = seen(build(name, tiny_clip), **prior(PROMPT, negative_prompt="blurry"), **CALLS[name])
    assert_near(rows[0], embed(adapter, "blurry"), embed(adapter, PROMPT))


@pytest.mark.parametrize("name", COMBINED)
def test_load_adapter_into_combined_pipelines(name, tiny_clip, adapter_folder, adapter, embed, zero_image_embeds):
    pipe = build(name, tiny_clip)
    assert csdiff.load_adapter(pipe, adapter_folder) is pipe
    assert_near(seen(pipe, prompt=PROMPT, **CALLS[name])[0], zero_image_embeds, embed(adapter, PROMPT))
    options = {"negative_prompt": "blurry", "prior_num_inference_steps": 7, "prior_guidance_scale": 1.0}
    rows = seen(pipe, prompt=PROMPT, **CALLS[name], **options)
    assert_near(rows[0], embed(adapter, "blurry"), embed(adapter, PROMPT))


def test_auto_pipeline_saved_and_reloaded(tiny_clip, adapter, embed, zero_image_embeds, tmp_path):
    pipe = csdiff.load_adapter(build("KandinskyV22CombinedPipeline", tiny_clip), adapter)
    pipe.save_pretrained(tmp_path)
    reloaded = AutoPipelineForText2Image.from_pretrained(tmp_path)
    assert type(reloaded) is type(pipe)
    assert_near(seen(reloaded, prompt=PROMPT)[0], zero_image_embeds, embed(adapter, PROMPT))
    other_task = AutoPipelineForImage2Image.from_pipe(pipe)
    assert type(other_task).__name__ == "KandinskyV22Img2ImgCombinedPipeline"
    assert type(other_task.prior_prior) is type(adapter)


def test_the_prior_pipeline_mixes_prompts(tiny_clip, adapter, embed):
    pipe = csdiff.load_adapter(build("KandinskyV22PriorPipeline", tiny_clip), adapter)
    mixed = pipe.interpolate([PROMPT, "a cat"], [0.25, 0.75]).image_embeds
    assert_near(mixed, 0.25 * embed(adapter, PROMPT) + 0.75 * embed(adapter, "a cat"))


def test_stable_unclip_with_load_adapter_saved_and_reloaded(tiny_clip, adapter_folder, adapter, embed, tmp_path):
    pipe = csdiff.load_adapter(build("StableUnCLIPPipeline", tiny_clip), adapter_folder)
    (rows, *_), positive = seen(pipe, prompt=PROMPT), embed(adapter, PROMPT)
    assert_near(rows, torch.zeros_like(positive), positive)
    rows = seen(pipe, prompt=[PROMPT, "a cat"], num_images_per_prompt=2)[0].chunk(2)[1]
    assert_near(rows, embed(adapter, PROMPT, "a cat").repeat_interleave(2, dim=0))
    pipe.save_pretrained(tmp_path)
    reloaded = StableUnCLIPPipeline.from_pretrained(tmp_path)
    assert_near(seen(reloaded, prompt=PROMPT, prior_guidance_scale=1.0)[0].chunk(2)[1], positive)


def test_stable_unclip_and_stable_cascade_take_image_embeds(tiny_clip, adapter, embed):
    positive = embed(adapter, PROMPT)
    rows = seen(build("StableUnCLIPImg2ImgPipeline", tiny_clip), prompt=PROMPT, image_embeds=positive, noise_level=0)
    assert_near(rows[0].chunk(2)[1], positive)
    cascade = build("StableCascadePriorPipeline", tiny_clip)
    size = {"height": 128, "width": 128, "output_type": "pt"}
    rows = seen(cascade, prompt=PROMPT, **ip_adapter_arguments(cascade, positive), **size)
    assert_near(rows[0], positive, torch.zeros_like(positive))


@pytest.fixture(scope="module")
def karlo(tiny_clip, tmp_path_factory):
    torch.manual_seed(0)
    return karlo_folder(tmp_path_factory.mktemp("karlo"), tiny_clip)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_karlo_with_an_adapter(karlo, adapter, guidance):
    pipe = load_karlo(adapter, karlo, check=False)
    tokens = pipe.tokenizer(PROMPT, padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        expected = adapter.embed(pipe.text_encoder(tokens.input_ids).text_embeds)
    assert_near(seen(pipe, prompt=PROMPT, decoder_guidance_scale=guidance)[0], expected)


def test_karlo_with_components_and_its_own_prior(karlo, tiny_clip):
    prior = prior_transformer(tiny_clip)
    projection = UnCLIPTextProjModel.from_pretrained(karlo, subfolder="text_proj")
    pipe = load_karlo(repo=karlo, prior=prior, text_proj=projection)
    assert (pipe.prior, pipe.text_proj) == (prior, projection)
    prior.save_pretrained(karlo / "prior")
    assert isinstance(load_karlo(repo=karlo, dtype=torch.bfloat16).prior, PriorTransformer)


def test_embedding_prior_hands_over_any_embedding(karlo):
    prior = EmbeddingPrior(embedding_dim=DIM)
    pipe = load_karlo(repo=karlo, prior=prior, prior_scheduler=OneShotScheduler())
    prior.image_embeds = torch.randn(2, DIM) * 10
    # whatever the guidance: both halves get the same embedding
    assert_near(seen(pipe, prompt=[PROMPT, "a cat"], prior_guidance_scale=4.0)[0], prior.image_embeds)


@pytest.mark.parametrize("name", STABLE)
@pytest.mark.parametrize(("guidance", "negative"), [(1.0, None), (5.0, None), (5.0, "blurry")])
def test_stable_diffusion_is_prompted_by_the_adapter(name, guidance, negative, pipes, adapter, embed):
    pipe, positive = pipes(name), embed(adapter, PROMPT)
    negative = None if negative is None else embed(adapter, negative)
    given = ip_adapter_arguments(pipe, positive, negative, guidance=guidance > 1)
    rows = seen(pipe, prompt=PROMPT, **given, **CALLS[name], guidance_scale=guidance)
    expected = [torch.zeros_like(positive) if negative is None else negative] if guidance > 1 else []
    assert_near(rows[0], *expected, positive)


@pytest.mark.parametrize("name", FLUX)
@pytest.mark.parametrize("true_cfg", [1.0, 3.0])
def test_flux_is_prompted_by_the_adapter_and_true_cfg_by_the_negative(name, true_cfg, pipes, adapter, embed):
    pipe, positive, negative = pipes(name), embed(adapter, PROMPT), embed(adapter, "blurry")
    call = {"prompt": PROMPT, **CALLS[name], "num_inference_steps": 1}
    options = {"true_cfg_scale": true_cfg, "negative_prompt": "blurry"} if true_cfg > 1 else {}
    rows = seen(pipe, **ip_adapter_arguments(pipe, positive, negative), **call, **options)
    assert_near(torch.cat(rows), *([positive, negative] if true_cfg > 1 else [positive]))
    # Without a negative of one's own there are two lists all the same: no image tower is asked for.
    assert len(seen(pipe, **ip_adapter_arguments(pipe, positive), **call)) == 1


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "FluxPipeline"])
def test_several_prompts_are_not_blended_without_a_word(name, pipes, adapter, embed):
    pipe, both = pipes(name), embed(adapter, "a cat", "a dog")
    with pytest.raises(CSDiffError, match=r"found 2.*blend=True"):
        ip_adapter_arguments(pipe, both)
    given = ip_adapter_arguments(pipe, both, guidance=False, blend=True)
    assert_near(seen(pipe, prompt=PROMPT, **given, guidance_scale=1.0)[0], both)


def test_shapes_of_ip_adapter_embeddings():
    one, three = torch.randn(DIM), torch.randn(3, DIM)
    assert ip_adapter_image_embeds(one)[0].shape == (2, 1, DIM)
    assert ip_adapter_image_embeds(three, guidance=False, blend=True)[0].shape == (1, 3, DIM)
    (embeds,) = ip_adapter_image_embeds(three.half(), one, blend=True)
    torch.testing.assert_close(embeds, torch.stack([one.half().expand(3, -1), three.half()]))
    for arguments, words in (
        ((torch.zeros(1, 2, DIM),), r"found \(1, 2, 16\)"),
        ((torch.zeros(1, DIM), torch.zeros(2, DIM)), r"expected \(1, 16\), found \(2, 16\)"),
    ):
        with pytest.raises(CSDiffError, match=words):
            ip_adapter_image_embeds(*arguments)


def test_pipelines_without_an_ip_adapter_or_a_prior_are_refused(tiny_clip, adapter):
    pipe = build("KandinskyV22Pipeline", tiny_clip)
    with pytest.raises(CSDiffError, match="found KandinskyV22Pipeline"):
        ip_adapter_arguments(pipe, torch.zeros(1, DIM))
    with pytest.raises(CSDiffError, match="found KandinskyV22Pipeline; hand it `image_embeds`"):
        csdiff.load_adapter(pipe, adapter)
