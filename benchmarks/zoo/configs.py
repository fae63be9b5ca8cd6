"""Tiny configurations of transformers' classifiers: three layers, 32 features, a vocabulary of 100.

Of a family's own default configuration those attributes that set its size are replaced (`SMALL`), in nested
configurations too; what a family needs beyond that is data (`OVERRIDES`). Sentence classifiers get tokens and
a mask, image classifiers pixels; the few that want something else are listed (`_OTHER_ROWS`).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch

from .sources import CLASSES, Built, Rows, Unbuildable, images, settled

TOKENS = 16
VOCABULARY = 100
PAD, EOS = 1, 2
IMAGE, IMAGE_PARTS = 4, 4

SMALL: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "dim", "embedding_size", "d_latents"), 32),
    **dict.fromkeys(("embed_dim", "word_embed_proj_dim", "projection_dim", "pooler_hidden_size"), 32),
    **dict.fromkeys(("true_hidden_size", "intra_bottleneck_size", "output_channels", "entity_emb_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers"), 3),
    **dict.fromkeys(("decoder_layers", "num_decoder_layers"), 1),  # every one reads the encoder: no cut lies between
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads", "index_n_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "num_self_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "num_cross_attention_heads"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "dff", "d_inner", "ffn_hidden_size", "hidden_dim"), 64),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "moe_intermediate_size"), 64),
    **dict.fromkeys(("shared_expert_intermediate_size", "index_topk"), 64),
    **dict.fromkeys(("head_dim", "d_kv", "d_head", "attention_head_size", "kv_channels", "rotary_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "index_head_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "query_pre_attn_scalar"), 8),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "mamba_dt_rank", "mamba_d_state", "gated_norm_rank"), 16),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "num_experts_per_layer"), 4),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "topk", "num_self_attends_per_block"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_feedforward_networks"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "max_source_positions"), 64),
    "vocab_size": VOCABULARY,
    "entity_vocab_size": 20,
    "image_size": 64,
    "attention_window": 8,
    "sliding_window": 8,
    "num_latents": 8,
}

# Attributes whose default is a list: the list's length stays, every number becomes this one.
SMALL_LISTS: dict[str, int] = {"depths": 2, "layers": 2, "attention_window": 8}

TOKEN_IDS: dict[str, int | bool] = {"pad_token_id": PAD, "bos_token_id": 0, "eos_token_id": EOS, "use_cache": False}

# By model type, nested configurations included.
OVERRIDES: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "donut-swin": {"image_size": 128, "embed_dim": 24, "window_size": 4, "depths": [2, 2], "num_heads": [3, 3]},
    "efficientnet": {"width_coefficient": 1.0, "depth_coefficient": 0.5, "hidden_dim": 1280},
    "esm": {"vocab_size": VOCABULARY},
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "layoutlmv3": {"coordinate_size": 4, "shape_size": 8, "visual_embed": False},
    "lilt": {"hidden_size": 48, "channel_shrink_ratio": 4},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "perceiver": {"num_cross_attention_heads": 1, "num_latents": 64, "d_latents": 64, "image_size": 16},
    "reformer": {
        "axial_pos_shape": [4, 4], "axial_pos_embds_dim": [8, 24], "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8, "hash_seed": 0, "num_buckets": 2, "pad_token_id": PAD,
    },
    "resnet": {"embedding_size": 16, "hidden_sizes": [16, 32, 64, 128]},
    "roc_bert": {"pronunciation_vocab_size": 20, "shape_vocab_size": 20},
    "shieldgemma2": {
        "mm_tokens_per_image": IMAGE_PARTS, "image_token_index": IMAGE, "yes_token_index": 5, "no_token_index": 6,
    },
    "siglip2_vision_model": {"num_patches": 16},
    "swin": {"image_size": 128, "embed_dim": 24, "window_size": 4, "depths": [2, 2], "num_heads": [3, 3]},
    "swinv2": {"image_size": 128, "embed_dim": 24, "window_size": 4, "depths": [2, 2], "num_heads": [3, 3]},
    "textnet": {"image_size": [64, 64]},
    "t5": {"decoder_start_token_id": PAD},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 6, "attn_layer_period": 3, "attn_layer_offset": 1},
    "zamba2": {
        "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "n_mamba_heads": 8,
        "mamba_d_state": 16, "chunk_size": 8,
    },
}  # fmt: skip


def architectures() -> list[str]:
    """`type/Architecture` of both auto classes, each architecture once."""
    found: dict[str, str] = {}
    for kind in ("SEQUENCE", "IMAGE"):
        for family, names in _mapping(kind).items():
            for name in names:
                found.setdefault(name, family)
    return [f"{family}/{name}" for name, family in found.items()]


def _mapping(kind: str) -> dict[str, tuple[str, ...]]:
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    names = getattr(auto, f"MODEL_FOR_{kind}_CLASSIFICATION_MAPPING_NAMES")
    return {family: (name,) if isinstance(name, str) else tuple(name) for family, name in names.items()}


def sentences(count: int, seed: int, vocabulary: int) -> dict[str, torch.Tensor]:
    """Rows of tokens `[count, TOKENS]`, each ended by `EOS` and then padded, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, vocabulary, (count, TOKENS), generator=generator)
    length = torch.randint(TOKENS // 2, TOKENS + 1, (count, 1), generator=generator)
    mask = (torch.arange(TOKENS) < length).long()
    ids = torch.where(torch.arange(TOKENS) == length - 1, EOS, ids)
    return {"input_ids": torch.where(mask.bool(), ids, PAD), "attention_mask": mask}


def _patches(count: int, seed: int, vocabulary: int) -> dict[str, torch.Tensor]:
    """Images as rows of 4 x 4 patches with their mask and shape."""
    pixels = images(64)(count, seed)["x"].unfold(2, 16, 16).unfold(3, 16, 16)
    flat = pixels.permute(0, 2, 3, 4, 5, 1).reshape(count, 16, -1)
    shape = torch.full((count, 2), 4)
    return {"pixel_values": flat, "pixel_attention_mask": torch.ones(count, 16).long(), "spatial_shapes": shape}


def _pixels_as_tokens(count: int, seed: int, vocabulary: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(0, vocabulary - 1, (count, TOKENS), generator=generator)}


def _image_and_question(count: int, seed: int, vocabulary: int) -> dict[str, torch.Tensor]:
    """Sentences whose first tokens stand for the parts of an image."""
    rows = sentences(count, seed, vocabulary)
    rows["input_ids"][:, :IMAGE_PARTS] = IMAGE
    return {**rows, **images(SMALL["image_size"], name="pixel_values")(count, seed)}


def _without_mask(rows: Rows, count: int, seed: int) -> dict[str, torch.Tensor]:
    return {name: value for name, value in rows(count, seed).items() if name != "attention_mask"}


# Image classifiers that take something else than pixels; (count, seed, vocabulary) -> rows.
_OTHER_ROWS: dict[str, Callable[..., dict[str, torch.Tensor]]] = {
    "siglip2": _patches,
    "imagegpt": _pixels_as_tokens,
    "shieldgemma2": _image_and_question,
}


# Experts are chosen from the embedding itself: padding's zeros tie them all, and every library breaks ties its own way.
_ROUTED_BY_EMBEDDING = ("jetmoe",)


def build(name: str) -> Built:
    """`type/Architecture` -> model from a tiny configuration. Raises `Unbuildable`."""
    transformers = importlib.import_module("transformers")
    family, architecture = name.split("/")
    torch.manual_seed(0)
    try:
        model = getattr(transformers, architecture)(tiny(family)).eval()
    except ImportError as error:
        raise Unbuildable(" ".join(str(error).split())[:200]) from error
    if model._can_set_experts_implementation():
        model.set_experts_implementation("batched_mm")  # the others are loops over data, or operators of their own
    if family in _ROUTED_BY_EMBEDDING:
        with torch.no_grad():
            model.get_input_embeddings().weight[PAD].normal_()
    pictures = any(architecture in names for names in _mapping("IMAGE").values())
    if pictures and family not in _OTHER_ROWS:
        rows = images(_image_size(model.config), getattr(model.config, "num_channels", 3), "pixel_values")
    else:
        vocabulary = getattr(model.config.get_text_config(), "vocab_size", VOCABULARY)
        rows = functools.partial(_OTHER_ROWS.get(family, sentences), vocabulary=vocabulary)
        if "attention_mask" not in inspect.signature(model.forward).parameters:
            rows = functools.partial(_without_mask, rows)
    return Built(settled(model, rows), rows)


def _image_size(config: Any) -> int:
    for part in (config, *(v for v in vars(config).values() if hasattr(v, "model_type"))):
        size = getattr(part, "image_size", None)
        if size is not None:
            return int(size if isinstance(size, int) else size[0])
    return SMALL["image_size"]


def tiny(family: str) -> Any:
    """The family's configuration, made small."""
    mapping = importlib.import_module("transformers.models.auto.configuration_auto").CONFIG_MAPPING
    if family not in mapping:
        raise Unbuildable(f"transformers has no configuration {family!r}")
    kind = mapping[family]
    return kind(**{**_small(kind), "num_labels": CLASSES, **OVERRIDES.get(family, {})})


def _small(kind: type) -> dict[str, Any]:
    """Replacements for the sizes a kind of configuration declares; what it derives from them it derives anew."""
    found: dict[str, Any] = {}
    for declared in dataclasses.fields(kind):
        key, value = declared.name, declared.default
        if key in TOKEN_IDS:
            found[key] = TOKEN_IDS[key]
        elif isinstance(value, list | tuple) and key in SMALL_LISTS:
            found[key] = [SMALL_LISTS[key]] * len(value)
        elif key in SMALL and isinstance(value, int | float):
            found[key] = min(value, SMALL[key])
    for key, part in vars(kind()).items():
        if hasattr(part, "model_type"):
            found[key] = {**_small(type(part)), "model_type": part.model_type, **OVERRIDES.get(part.model_type, {})}
    if "qk_rope_head_dim" in found:  # latent attention has as many keys as queries
        found["num_key_value_heads"] = found["num_attention_heads"]
    return found
