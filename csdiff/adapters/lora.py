"""Low-rank adaptation of the text encoder itself: its projected text embedding becomes the image embedding."""

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin  # noqa: F401  diffusers looks this name up here when it reloads a pipeline
from diffusers.configuration_utils import register_to_config
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection

from csdiff.adapters import folder
from csdiff.adapters.base import Adapter
from csdiff.adapters.linear import LinearAdapter
from csdiff.embeddings.encoders import encoder_files, find_encoder, load_weights
from csdiff.errors import CSDiffError
from csdiff.files import absolute

TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"


class LoRAAdapter(Adapter):
    r"""LoRA in every layer of a CLIP text encoder, then a per-dimension map from text to image statistics.

        W x + (alpha / rank) B A x      in each target of the frozen encoder,
        r = (t' - text_mean) / text_std * clip_std + clip_mean,    t' the adapted projected text embedding

    It takes token ids: train with `embed_input_ids`. For pipelines it is two parts, the text encoder (`text_encoder`,
    or `merged_text_encoder()` free of PEFT) and a prior (`as_prior()`); as a prior itself it takes embeddings of its
    own text encoder. Saved as a PEFT adapter, which plain PEFT loads onto the same encoder, beside a
    small safetensors file with the statistics; the frozen encoder is neither saved nor in `state_dict()`.

    Args:
        embedding_dim (`int`): Width of the encoder's projection, and of the image embeddings.
        text_encoder (`str`, *optional*, defaults to `"tiny-clip"`): Encoder id: a preset name, a folder or a Hub id.
        rank (`int`, *optional*, defaults to 8): Rank of each update.
        alpha (`float`, *optional*, defaults to 16): Scale, over `rank`.
        dropout (`float`, *optional*, defaults to 0.0): On the input of each update, in [0, 1).
        target_modules (`list[str]`, *optional*): Names of the linear layers; q, k, v, out, fc1 and fc2 by default.
        base_model (`CLIPTextModelWithProjection`, *optional*): The encoder, if it is in memory already; not in the
            config. Its weights are frozen and its layers wrapped in place.

    Source: LoRA, arXiv 2106.09685, equation 3; rank and targets of CS-Aligner, arXiv 2502.17028.
    """

    uses_input_ids = True
    ignore_for_config = ["base_model"]
    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        *,
        embedding_dim: int,
        text_dim: int | None = None,
        text_encoder: str = "tiny-clip",
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        target_modules: list[str] = TARGETS,
        base_model: nn.Module | None = None,
    ):
        super().__init__()
        text_dim = self._init_contract(embedding_dim, text_dim)
        target_modules = list(target_modules)
        # Where it is from any directory.
        text_encoder = str(absolute(text_encoder)) if Path(text_encoder).is_dir() else text_encoder
        self._record(target_modules=target_modules, text_encoder=text_encoder)
        if base_model is None:
            # float32 whatever the folder holds: updates of half-precision weights would be lost in their rounding
            files = encoder_files(text_encoder, "text")
            base_model = load_weights(CLIPTextModelWithProjection, files, None, torch.float32)
        found = base_model.config.projection_dim
        if not found == embedding_dim == text_dim:
            raise CSDiffError(
                f"A LoRA adapter keeps the text encoder's width: {text_encoder} projects to {found}, found text_dim "
                f"{text_dim} and embedding_dim {embedding_dim}; use mlp or transformer for other image embeddings."
            )
        linear = {path.rpartition(".")[2] for path, part in base_model.named_modules() if isinstance(part, nn.Linear)}
        missing = sorted(set(target_modules) - linear)
        if missing or not target_modules:
            raise CSDiffError(
                f"LoRA targets {missing or 'are empty'} do not exist in text encoder {text_encoder}; its linear "
                f"layers are {sorted(linear)}."
            )
        config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=target_modules, bias="none")
        with warnings.catch_warnings():
            # PEFT reads an attribute that transformers renames.
            warnings.simplefilter("ignore", FutureWarning)
            self.peft_model = get_peft_model(base_model, config)
        self.peft_model.peft_config["default"].base_model_name_or_path = text_encoder
        self.register_state_dict_post_hook(_drop_frozen)
        self.register_load_state_dict_post_hook(_allow_frozen_missing)

    @property
    def text_encoder(self) -> nn.Module:
        """The `CLIPTextModelWithProjection` with its LoRA layers in place; give it to a pipeline as `text_encoder`."""
        return self.peft_model.get_base_model()

    def merged_text_encoder(self) -> nn.Module:
        """A copy of the text encoder with the updates added into its weights: plain transformers, no PEFT."""
        return copy.deepcopy(self.peft_model).merge_and_unload()

    def as_prior(self) -> LinearAdapter:
        """The part after the text encoder, for a pipeline's `prior`: with `text_encoder` it is the whole adapter."""
        prior = LinearAdapter(embedding_dim=self.config.embedding_dim, method="whiten")
        prior._copy_statistics(self)
        prior.metadata = copy.deepcopy(self.metadata)
        return prior.to(self.clip_mean.device).eval()

    def encode(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Token ids (B, L) to adapted text embeddings (B, D) and last hidden states (B, L, H)."""
        output = self.peft_model(input_ids=input_ids, attention_mask=attention_mask)
        return output.text_embeds, output.last_hidden_state

    def embed_input_ids(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        """Token ids (B, L) to raw image embeddings (B, D); `options` are `spread` and `generator` of `embed`."""
        return self.embed(self.encode(input_ids, attention_mask)[0], **options)

    def predict(self, text: Tensor, states: Tensor | None, mask: Tensor | None, latents: Tensor | None) -> Tensor:
        return text

    def set_statistics(
        self, mean: Tensor, std: Tensor, text_mean: Tensor | None = None, text_std: Tensor | None = None
    ) -> None:
        """As `Adapter.set_statistics`; without text statistics, the image's: `embed` is then the identity."""
        text_mean = mean if text_mean is None else text_mean
        text_std = std if text_std is None else text_std
        super().set_statistics(mean, std, text_mean, text_std)

    def _write_weights(self, directory: Path, max_shard_size: int | str, variant: str | None) -> None:
        self.peft_model.save_pretrained(directory, safe_serialization=True, save_embedding_layers=False)
        (directory / PEFT_WEIGHTS).rename(directory / folder.with_variant(PEFT_WEIGHTS, variant))
        self.save_config(directory)
        statistics = {name: getattr(self, name).contiguous() for name in self._STATISTICS}
        save_file(statistics, directory / folder.with_variant(folder.WEIGHTS, variant), metadata={"format": "pt"})

    @classmethod
    def _load_folder(cls, path: Path, config: dict[str, Any], options: dict[str, Any]):
        values = {name: value for name, value in config.items() if not name.startswith("_")}
        names = (folder.WEIGHTS, PEFT_WEIGHTS)
        files = [folder.weight_files(path, options.get("variant"), name)[0] for name in names]
        headers = [folder.read_header([file]) for file in files]
        peft = folder.read_part(path / PEFT_CONFIG)
        expected = {"peft_type": "LORA", "r": values.get("rank"), "target_modules": values.get("target_modules")}
        found = {name: peft.get(name) for name in expected}
        for side in (expected, found):
            targets = side["target_modules"]
            side["target_modules"] = sorted(map(str, targets)) if isinstance(targets, list) else targets
        if found != expected:
            raise CSDiffError(
                f"{path / PEFT_CONFIG} must have {expected} as {folder.CONFIG}, found {found}; save the adapter again."
            )
        folder.check_sizes(path, values, headers[0] | headers[1])
        with folder.described_by(path, cls):
            if options.get("base_model") is None:
                known = {"id": values.get("text_encoder")}
                values["text_encoder"] = find_encoder(known, "text", of=f"the adapter {path}", beside=[path])["id"]
            adapter = cls(**values, base_model=options.get("base_model"))
        lora = get_peft_model_state_dict(adapter.peft_model, save_embedding_layers=False)
        statistics = {name: getattr(adapter, name) for name in cls._STATISTICS}
        for file, header, tensors in zip(files, headers, (statistics, lora), strict=True):
            folder.check_tensors(path, tensors, header)
            folder.check_values(load_file(file), header)
        set_peft_model_state_dict(adapter.peft_model, load_file(files[1]))
        adapter.load_state_dict(load_file(files[0]), strict=False)
        return adapter.eval(), {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": [], "error_msgs": []}


def _is_frozen(name: str) -> bool:
    return "peft_model." in name and ".lora_" not in name


def _drop_frozen(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, local_metadata: dict) -> None:
    for name in [name for name in state_dict if name.startswith(prefix) and _is_frozen(name)]:
        del state_dict[name]


def _allow_frozen_missing(module: nn.Module, incompatible_keys) -> None:
    incompatible_keys.missing_keys[:] = [name for name in incompatible_keys.missing_keys if not _is_frozen(name)]
