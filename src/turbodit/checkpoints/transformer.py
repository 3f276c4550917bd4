"""Loading the DiT from any layout we know, and saving it in diffusers' layout.

A quantised one loads as it is, and a plain one can be quantised on the way, layer by layer.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from turbodit.checkpoints.formats import native_weights
from turbodit.checkpoints.keys import to_diffusers
from turbodit.checkpoints.linears import (
    SCALE,
    VALUES,
    convert_linears,
    stored_format,
)
from turbodit.checkpoints.packed import unpacked
from turbodit.checkpoints.stated import Stated, check_stated, read_stated
from turbodit.checkpoints.write import CONFIG_KEY, new_folder, write_folder
from turbodit.config import PRESETS, ModelConfig, TransformerConfig
from turbodit.model.wan import Residual, WanModel
from turbodit.quantization import (
    QuantizedLinear,
    check_no_lora,
    is_quantizable,
    linear_format,
    replace_linears,
)
from turbodit.weights import (
    LazyTensor,
    LazyWeights,
    assign_weights,
    check_fit,
    lazy_weights,
    listing,
    read_json,
    read_metadata,
)

CLASSES = ("WanModel", "WanTransformer3DModel")  # in original and diffusers config.json
FORMAT_KEY = "linear"  # in config.json: the 8-bit format of a quantised model's linear layers
LINEAR_BRANCH = ".proj_l."  # in the names of sparse-linear attention's own parameters
TEXT_LEN = 512  # where a config does not say; diffusers' cannot


class Stored(NamedTuple):
    """A DiT that is not read yet: its shape, 8-bit format, weights under original names, and what
    its files say about its use (`checkpoints.stated`)."""

    config: TransformerConfig
    format: str | None
    weights: LazyWeights
    stated: Stated


def load_transformer(
    source: Path | str,
    config: TransformerConfig | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    attention: str = "sdpa",
    attention_settings: Mapping[str, Any] | None = None,
    linear: str | None = None,
    residual: Residual = "float32",
) -> WanModel:
    """The DiT stored at `source`, in evaluation mode.

    Args:
        source: a diffusers `transformer/` folder, perhaps packed (`checkpoints.packed`); an
            original Wan folder (or one expert's); or one file: safetensors or PyTorch, with
            original or diffusers names, perhaps with prefixes as ComfyUI and rCM write them,
            plain or quantised (docs/checkpoints.md).
        config: its shape. Read from `config.json` or a file's metadata where it is there;
            another single file's is that of the preset which has the file's shapes.
        dtype: of its weights, but for the few that Wan keeps in float32, and those in 8 bits.
        attention: back-end of self attention.
        attention_settings: of the back-end, e.g. {"ratio": 0.15} for "sla".
        linear: 8-bit format of the linear layers (`turbodit.quantization.linear_format`);
            None for that of `source`. Weights in another form are converted on `device` one
            at a time; those that were quantised in another format are rounded twice.
        residual: dtype of the residual stream, as `WanModel` takes it.

    A source without the linear branch (proj_l) of a back-end that has one gets an untrained
    one, which adds nothing, and a warning.

    Raises:
        FileNotFoundError: no such folder or file, no weights in it, or a shard is missing.
        ValueError: truncated or unsupported file, another architecture, names or shapes
            that do not fit, a trained linear branch that `attention` has no place for, a
            shape that has to be given as `config`, an unknown format, a mixture of formats,
            or NaN and infinities to quantise.
        OSError: a packed source, and a cache that cannot be written.
    """
    source = Path(source)
    format = None if linear is None else linear_format(linear)
    stored = open_transformer(source, config, mapped=format is None)
    how = (attention, attention_settings, residual)
    model = empty_transformer(stored.config, stored.format, *how)
    weights = _with_linear_branch(stored.weights, model, source, attention)
    check_fit(model, weights, source)
    if format is not None and format != stored.format:
        weights = quantized_weights(weights, model, source, stored.format, format, device)
        model = empty_transformer(stored.config, format, *how)
    assign_weights(model, weights, source, dtype=dtype, device=device, keep_float32=_stays_float32)
    return model.eval()


def open_transformer(
    source: Path, config: TransformerConfig | None = None, *, mapped: bool = True
) -> Stored:
    """The DiT at `source`, not read yet.

    Args:
        mapped: as for `lazy_weights`.

    Raises: as `load_transformer`.
    """
    source = unpacked(source)
    weights = native_weights(lazy_weights(source, mapped=mapped), source)
    content = _stated_content(source)
    format = stored_format(weights, source, content.get(FORMAT_KEY))
    config = config or _config_of(source, content, weights)
    return Stored(config, format, weights, stated_use(source))


def stated_use(source: Path) -> Stated:
    """What the files of the DiT at `source` say about its use; no weights are looked at.

    Raises:
        ValueError: something unknown, or values of another kind (`stated.check_stated`).
    """
    return read_stated(_stated_content(source), _config_place(source))


def empty_transformer(
    config: TransformerConfig,
    format: str | None,
    attention: str,
    attention_settings: Mapping[str, Any] | None = None,
    residual: Residual = "float32",
) -> WanModel:
    """A DiT on the meta device, with 8-bit linear layers if there is a format."""
    with torch.device("meta"):
        model = WanModel(config, attention, attention_settings, residual)
        if format is not None:
            replace_linears(model, format)
    return model


def quantized_weights(
    weights: LazyWeights,
    model: WanModel,
    source: Path,
    old: str | None,
    new: str,
    device: torch.device | str,
) -> LazyWeights:
    """The weights of `model`, which are in format `old`, in format `new`."""
    linears = (torch.nn.Linear, QuantizedLinear)
    layers = [name for name, module in model.named_modules() if isinstance(module, linears)]
    layers = [name for name in layers if is_quantizable(name)]
    return convert_linears(weights, layers, source, old=old, new=new, device=device)


def _stays_float32(name: str) -> bool:
    return WanModel.keep_float32(name) or name.endswith(SCALE)


def _with_linear_branch(
    weights: LazyWeights, model: WanModel, source: Path, attention: str
) -> LazyWeights:
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
    return {**weights, **{n: LazyTensor.of(torch.zeros(p.shape)) for n, p in wanted.items()}}


def save_transformer(
    model: WanModel,
    folder: Path | str,
    max_shard_size: int | str = "5GB",
    stated: Stated | None = None,
) -> None:
    """Write `model` in diffusers' layout: config.json and safetensors, sharded if large.

    8-bit linear layers are written as they are, and their format into config.json. All files
    are complete before the weights that `folder` held are removed.

    Args:
        max_shard_size: bytes per file, or a string such as "16MB".
        stated: how the model is to be used, for config.json (`checkpoints.stated`).

    Raises:
        ValueError: linear layers in several formats, packed into others or with a LoRA; or
            `stated` has what is unknown.
        OSError: it cannot be written.
    """
    stated = stated or {}
    check_stated(stated, "the model to be saved")
    check_no_lora(model)
    formats = {m.format for m in model.modules() if isinstance(m, QuantizedLinear)}
    if len(formats) > 1:
        raise ValueError(f"the model mixes formats of linear layers: {', '.join(sorted(formats))}")
    format = next(iter(formats), None)
    weights = {name: LazyTensor.of(tensor) for name, tensor in model.state_dict().items()}
    missing = empty_transformer(model.config, format, "sdpa").state_dict().keys() - weights.keys()
    if missing:
        raise ValueError(f"the model cannot be saved, it has no {listing(sorted(missing))}")
    with new_folder(Path(folder)) as partial:
        write_transformer(partial, Stored(model.config, format, weights, stated), max_shard_size)


def write_transformer(
    folder: Path,
    stored: Stored,
    max_shard_size: int | str = "5GB",
    advance: Callable[[], None] = lambda: None,
) -> None:
    """Write a DiT in diffusers' layout into an empty folder, a tensor at a time.

    Raises:
        OSError: it cannot be written.
    """
    weights = {to_diffusers(name): tensor for name, tensor in stored.weights.items()}
    config = config_json(stored.config, stored.format, stored.stated)
    write_folder(folder, weights, config, max_shard_size, advance)


def transformer_config(source: Path | str) -> TransformerConfig:
    """The shape of the DiT at `source`, which is what `load_transformer` takes.

    Raises: as `load_transformer`.
    """
    return open_transformer(Path(source), mapped=False).config


def presets_like(config: TransformerConfig) -> list[ModelConfig]:
    """The presets whose DiT has the weights of `config`'s DiT, name by name and shape by shape."""
    return [model for model in PRESETS.values() if _shape(model.transformer) == _shape(config)]


def _config_of(source: Path, content: dict[str, Any], weights: LazyWeights) -> TransformerConfig:
    """The shape of the DiT at `source`, from what it states, its weights and the presets."""
    if content:
        # The original form of config.json does not say whether there are CLIP layers.
        image_dim, positions = _image_shape(weights)
        config = _stated_config(_config_place(source), content)
        return replace(config, image_dim=image_dim, image_positions=positions)
    if source.is_dir():
        raise FileNotFoundError(f"no config.json in {source}")
    seen = _seen_config(source, weights)
    alike = presets_like(seen)
    if not alike:
        raise ValueError(
            f"{source} comes without a config.json and fits no known model (width {seen.dim}, "
            f"{seen.num_layers} layers, {seen.in_dim} input channels); give its config"
        )
    return alike[0].transformer


def _config_place(source: Path) -> str:
    return str(source / "config.json") if source.is_dir() else f"the metadata of {source}"


def _stated_content(source: Path) -> dict[str, Any]:
    """A folder's config.json, or what our single files have in its place; empty if neither."""
    if source.is_dir():
        path = source / "config.json"
        return read_json(path) if path.exists() else {}
    if source.suffix != ".safetensors" or not source.exists():
        return {}
    return json.loads(read_metadata(source).get(CONFIG_KEY, "{}"))


def _stated_config(place: str, data: dict[str, Any]) -> TransformerConfig:
    """The shape in `data`, in diffusers' or the original form of config.json."""
    name = data.get("_class_name", "none")
    if name not in CLASSES:
        raise ValueError(
            f"{place} describes the architecture {name}; supported: {', '.join(CLASSES)}"
        )
    if not data.get("cross_attn_norm", True) or not data.get("qk_norm", True):
        raise ValueError(f"{place} describes a variant without cross_attn_norm or qk_norm")
    try:
        return _from_diffusers(data) if "num_attention_heads" in data else _from_native(data)
    except KeyError as missing:
        raise ValueError(f"{place} does not say {missing}") from missing


def _seen_config(source: Path, weights: LazyWeights) -> TransformerConfig:
    """What the weights alone tell; the number of heads and of text tokens they don't."""
    try:
        dim, in_dim, *patch = weights["patch_embedding.weight"].shape
        image_dim, positions = _image_shape(weights)
        blocks = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
        return TransformerConfig(
            dim=dim,
            ffn_dim=weights[_stored_name(weights, "blocks.0.ffn.0")].shape[0],
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


def _stored_name(weights: LazyWeights, layer: str) -> str:
    """The name of a linear layer's weight, plain or quantised."""
    names = [layer + ending for ending in VALUES.values()]
    return next((name for name in names if name in weights), f"{layer}.weight")


def _image_shape(weights: LazyWeights) -> tuple[int | None, int | None]:
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


def config_json(
    config: TransformerConfig, format: str | None, stated: Stated | None = None
) -> dict[str, Any]:
    """The content of config.json, in diffusers' form."""
    data: dict[str, Any] = {
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
    if format is not None:
        data[FORMAT_KEY] = format  # ours, too, as is `stated`
    return data | dict(stated or {})
