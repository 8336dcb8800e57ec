"""Karlo, built from its components."""

import os

import torch
from diffusers import PriorTransformer, UnCLIPPipeline, UnCLIPScheduler, UNet2DConditionModel, UNet2DModel
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from csdiff.pipelines.loading import load_adapter
from csdiff.pipelines.scheduler import EmbeddingPrior

KARLO = "kakaobrain/karlo-v1-alpha"


def load_karlo(
    adapter=None,
    repo: str | os.PathLike = KARLO,
    *,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    use_safetensors: bool = True,
    check: bool = True,
    **components,
):
    """Loads Karlo's `UnCLIPPipeline` with an adapter in place of its diffusion prior.

    `UnCLIPPipeline.from_pretrained` does not work since diffusers 0.38: Karlo's index names a module that has moved.
    Every component still loads by itself, and the constructor takes them. The prior's own weights are not read when
    an adapter is given.

    Args:
        adapter: an adapter, its folder, or a loaded `PriorTransformer`; None keeps Karlo's own prior.
        repo: hub id or folder with Karlo's subfolders.
        dtype: of the weights.
        revision: of the hub repository.
        use_safetensors: False also reads weights in PyTorch's own format (which diffusers loads without running code
            in them).
        check: refuse an adapter that does not fit (see `load_adapter`).
        **components: components already loaded (`decoder=`, `text_encoder=`, ...); they are used as they are.

    Returns:
        An `UnCLIPPipeline`.

    Raises:
        CSDiffError: the adapter does not fit.
        OSError: a component's folder is missing or incomplete.
    """
    classes = {
        "decoder": UNet2DConditionModel,
        "text_encoder": CLIPTextModelWithProjection,
        "tokenizer": CLIPTokenizer,
        "text_proj": UnCLIPTextProjModel,
        "super_res_first": UNet2DModel,
        "super_res_last": UNet2DModel,
        "prior_scheduler": UnCLIPScheduler,
        "decoder_scheduler": UnCLIPScheduler,
        "super_res_scheduler": UnCLIPScheduler,
        "prior": PriorTransformer,
    }
    loaded = dict(components)
    for name, cls in classes.items():
        if name in loaded or (name == "prior" and adapter is not None):
            continue
        options = {"subfolder": name} | ({"revision": revision} if revision else {})
        if issubclass(cls, torch.nn.Module):
            options |= {"dtype": dtype, "use_safetensors": use_safetensors}
        loaded[name] = cls.from_pretrained(repo, **options)
    # a placeholder of the right width, so that the adapter is checked against what the decoder takes
    loaded.setdefault("prior", EmbeddingPrior(embedding_dim=loaded["text_proj"].config.clip_embeddings_dim))
    pipe = UnCLIPPipeline(**loaded)
    return pipe if adapter is None else load_adapter(pipe, adapter, check=check)
