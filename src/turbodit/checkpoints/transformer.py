"""Loading the DiT from any layout we know, and saving it in diffusers' layout."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from turbodit.checkpoints.formats import native_weights
from turbodit.checkpoints.keys import to_diffusers
from turbodit.config import PRESETS, ModelConfig, TransformerConfig
from turbodit.model.wan import WanModel
from turbodit.weights import Weights, assign_weights, read_json, read_weights

CLASSES = ("WanModel", "WanTransformer3DModel")  # in original and diffusers config.json
WEIGHTS_NAME = "diffusion_pytorch_model"
LINEAR_BRANCH = ".proj_l."  # in the names of sparse-linear attention's own parameters
TEXT_LEN = 512  # where a config does not say; diffusers' cannot


def load_transformer(
    source: Path | str,
    config: TransformerConfig | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    attention: str = "sdpa",
    attention_settings: Mapping[str, Any] | None = None,
) -> WanModel:
    """The DiT stored at `source`, in evaluation mode.

    Args:
        source: a diffusers `transformer/` folder; an original Wan folder (or one expert's);
            or one file: safetensors or PyTorch, with original or diffusers names, perhaps
            with prefixes as ComfyUI and rCM write them.
        config: its shape. Read from `config.json` where there is one; a single file's is
            that of the preset which has the file's shapes.
        dtype: of its weights, but for the few that Wan keeps in float32.
        attention: back-end of self attention.
        attention_settings: of the back-end, e.g. {"ratio": 0.15} for "sla".

    A source without the linear branch (proj_l) of a back-end that has one gets an untrained
    one, which adds nothing, and a warning.

    Raises:
        FileNotFoundError: no such folder or file, no weights in it, or a shard is missing.
        ValueError: truncated or unsupported file, another architecture, names or shapes
            that do not fit, a trained linear branch that `attention` has no place for, or a
            shape that has to be given as `config`.
    """
    source = Path(source)
    weights = native_weights(read_weights(source), source)
    with torch.device("meta"):
        model = WanModel(config or _config_of(source, weights), attention, attention_settings)
    weights = _with_linear_branch(weights, model, source, attention)
    assign_weights(
        model, weights, source, dtype=dtype, device=device, keep_float32=model.keep_float32
    )
    return model.eval()


def _with_linear_branch(weights: Weights, model: WanModel, source: Path, attention: str) -> Weights:
    """`weights`, and zeros for the proj_l of `model`'s attention if they have none."""
    wanted = {name: p for name, p in model.state_dict().items() if LINEAR_BRANCH in name}
    found = any(LINEAR_BRANCH in name for name in weights)
    if found and not wanted:
        raise ValueError(
            f"{source} was trained with sparse-linear attention; supported: attention 'sla' or "
            f"'sagesla', got {attention!r}"
        )
    if found or not wanted:
        return weights
    warnings.warn(
        f"{source} was not trained with sparse-linear attention: {attention!r} has no linear "
        "branch to add, and leaves out most of the keys",
        stacklevel=3,
    )
    return {**weights, **{name: torch.zeros(p.shape) for name, p in wanted.items()}}


def save_transformer(
    model: WanModel, folder: Path | str, max_shard_size: int | str = "5GB"
) -> None:
    """Write `model` in diffusers' layout: config.json and safetensors, sharded if large.

    All files are complete before the weights that `folder` held are removed.

    Args:
        max_shard_size: bytes per file, or a string such as "16MB".
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        to_diffusers(name): tensor.detach().contiguous()
        for name, tensor in model.state_dict().items()
    }
    plan = split_torch_state_dict_into_shards(
        state, filename_pattern=WEIGHTS_NAME + "{suffix}.safetensors", max_shard_size=max_shard_size
    )
    with TemporaryDirectory(dir=folder, prefix="partial-") as name:
        partial = Path(name)
        for file, names in plan.filename_to_tensors.items():
            save_file({name: state[name] for name in names}, partial / file, {"format": "pt"})
        if plan.is_sharded:
            index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
            _write_json(partial / f"{WEIGHTS_NAME}.safetensors.index.json", index)
        _write_json(partial / "config.json", _diffusers_config(model.config))
        for old in folder.glob(f"{WEIGHTS_NAME}*"):
            old.unlink()
        for new in partial.iterdir():
            os.replace(new, folder / new.name)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def transformer_config(source: Path | str) -> TransformerConfig:
    """The shape of the DiT at `source`, which is what `load_transformer` takes.

    Raises: as `load_transformer`.
    """
    source = Path(source)
    return _config_of(source, native_weights(read_weights(source), source))


def presets_like(config: TransformerConfig) -> list[ModelConfig]:
    """The presets whose DiT has the weights of `config`'s DiT, name by name and shape by shape."""
    return [model for model in PRESETS.values() if _shape(model.transformer) == _shape(config)]


def _config_of(source: Path, weights: Weights) -> TransformerConfig:
    """The shape of the DiT at `source`, from its config.json, its weights and the presets."""
    if source.is_dir():
        # The original form of config.json does not say whether there are CLIP layers.
        image_dim, positions = _image_shape(weights)
        return replace(_stated_config(source), image_dim=image_dim, image_positions=positions)
    seen = _seen_config(source, weights)
    alike = presets_like(seen)
    if not alike:
        raise ValueError(
            f"{source} comes without a config.json and fits no known model (width {seen.dim}, "
            f"{seen.num_layers} layers, {seen.in_dim} input channels); give its config"
        )
    return alike[0].transformer


def _stated_config(folder: Path) -> TransformerConfig:
    """What `folder/config.json` states, in diffusers' or the original form."""
    path = folder / "config.json"
    data = read_json(path)
    name = data.get("_class_name", "none")
    if name not in CLASSES:
        raise ValueError(
            f"{path} describes the architecture {name}; supported: {', '.join(CLASSES)}"
        )
    if not data.get("cross_attn_norm", True) or not data.get("qk_norm", True):
        raise ValueError(f"{path} describes a variant without cross_attn_norm or qk_norm")
    try:
        return _from_diffusers(data) if "num_attention_heads" in data else _from_native(data)
    except KeyError as missing:
        raise ValueError(f"{path} does not say {missing}") from missing


def _seen_config(source: Path, weights: Weights) -> TransformerConfig:
    """What the weights alone tell; the number of heads and of text tokens they don't."""
    try:
        dim, in_dim, *patch = weights["patch_embedding.weight"].shape
        image_dim, positions = _image_shape(weights)
        blocks = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
        return TransformerConfig(
            dim=dim,
            ffn_dim=weights["blocks.0.ffn.0.weight"].shape[0],
            num_heads=1,
            num_layers=len(blocks),
            in_dim=in_dim,
            out_dim=weights["head.head.weight"].shape[0] // math.prod(patch),
            text_dim=weights["text_embedding.0.weight"].shape[1],
            freq_dim=weights["time_embedding.0.weight"].shape[1],
            image_dim=image_dim,
            image_positions=positions,
        )
    except KeyError as missing:
        raise ValueError(f"{source} holds no whole Wan transformer: no {missing}") from missing


def _image_shape(weights: Weights) -> tuple[int | None, int | None]:
    """Width of the CLIP features and length of their position table, where there are any."""
    features, positions = weights.get("img_emb.proj.0.weight"), weights.get("img_emb.emb_pos")
    return (
        None if features is None else features.shape[0],
        None if positions is None else positions.shape[1],
    )


def _shape(config: TransformerConfig) -> TransformerConfig:
    """`config` without what does not show in the shapes of weights."""
    return replace(config, num_heads=1, text_len=TEXT_LEN, eps=1e-6)


def _from_diffusers(data: dict[str, Any]) -> TransformerConfig:
    heads = data["num_attention_heads"]
    return TransformerConfig(
        dim=heads * data["attention_head_dim"],
        ffn_dim=data["ffn_dim"],
        num_heads=heads,
        num_layers=data["num_layers"],
        in_dim=data["in_channels"],
        out_dim=data["out_channels"] or data["in_channels"],
        text_dim=data["text_dim"],
        text_len=data.get("text_len", TEXT_LEN),
        freq_dim=data["freq_dim"],
        patch_size=tuple(data["patch_size"]),
        eps=data["eps"],
        image_dim=data["image_dim"],
        image_positions=data.get("pos_embed_seq_len"),
    )


def _from_native(data: dict[str, Any]) -> TransformerConfig:
    names = ("dim", "ffn_dim", "num_heads", "num_layers", "in_dim", "out_dim", "freq_dim")
    optional = {name: data[name] for name in ("text_dim", "text_len", "eps") if name in data}
    return TransformerConfig(**{name: data[name] for name in names}, **optional)


def _diffusers_config(config: TransformerConfig) -> dict[str, Any]:
    data = {
        "_class_name": "WanTransformer3DModel",
        "patch_size": list(config.patch_size),
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.head_dim,
        "in_channels": config.in_dim,
        "out_channels": config.out_dim,
        "text_dim": config.text_dim,
        "freq_dim": config.freq_dim,
        "ffn_dim": config.ffn_dim,
        "num_layers": config.num_layers,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": config.eps,
        "image_dim": config.image_dim,
        "added_kv_proj_dim": None if config.image_dim is None else config.dim,
        "rope_max_seq_len": 1024,
        "pos_embed_seq_len": config.image_positions,
    }
    if config.text_len != TEXT_LEN:
        data["text_len"] = config.text_len  # ours: diffusers warns of it and goes on
    return data
