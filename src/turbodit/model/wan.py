"""The Wan diffusion transformer, all variants in one network (Wan, arXiv:2503.20314).

T2V, I2V with CLIP, first-last-frame, A14B experts (condition on channels, no CLIP) and
TI2V (time per latent frame) differ only in `TransformerConfig`. Parameter names are those
of the original checkpoints, so native files load without a map.

Shapes: B batch; C,T,H,W latents; L tokens; D width; n runs of tokens with a time each.
Precision: norms, modulation, time embedding and, unless told otherwise, the residual stream in
float32; the matrix products in the dtype of the weights (or of autocast), or in 8 bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
import torch.nn.functional as F
from torch import nn

from turbodit.attention import TEMPORAL_HEADS, AttentionFunction, attention_function
from turbodit.attention.temporal import by_frame, by_place, check_temporal_heads
from turbodit.config import TransformerConfig
from turbodit.kernels import wide
from turbodit.kernels.norm import Angles, add_norm, gated_add, norm
from turbodit.kernels.quantized_linear import Quantized
from turbodit.model.layers import (
    FeedForward,
    ImageEmbedding,
    LayerNorm,
    Linear,
    RMSNorm,
    patchify,
    timestep_embedding,
    unpatchify,
)
from turbodit.model.rope import rope_table
from turbodit.quantization import can_concatenate, concatenate, input_kind

Residual = Literal["float32", "bfloat16"]
KeysValues = tuple[torch.Tensor, torch.Tensor]  # each (B, L, heads, D/heads)


class Context(NamedTuple):
    """What cross attention attends to: tokens of the text, and of images in models with CLIP."""

    text: torch.Tensor  # (B, text_len, D)
    image: torch.Tensor | None  # (B, 257 or 514, D)


@dataclass(frozen=True, eq=False)
class EncodedContext:
    """A context as every block's keys and values, which no step changes: encoded once a prompt."""

    layers: tuple[tuple[KeysValues, ...], ...]

    def tensors(self) -> list[torch.Tensor]:
        return [x for pairs in self.layers for pair in pairs for x in pair]


class AttentionOp(nn.Module):
    """The attention call of a layer: what a back-end with parameters is a submodule of.

    It bears TurboDiffusion's names (`attn_op.local_attn.proj_l.weight`), and is where a hook
    finds q, k, v (B, L, heads, D).

    Attributes:
        temporal_heads: of these the back-end gets the tokens place by place, of the others frame
            by frame.
    """

    def __init__(self, attend: AttentionFunction, temporal_heads: Sequence[int] = ()) -> None:
        super().__init__()
        self.local_attn = attend
        self.temporal_heads = tuple(temporal_heads)

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, frames: int = 1
    ) -> torch.Tensor:
        if not self.temporal_heads:
            return self.local_attn(q, k, v)
        q, k, v = (by_place(x, self.temporal_heads, frames) for x in (q, k, v))
        return by_frame(self.local_attn(q, k, v), self.temporal_heads, frames)


class Attention(nn.Module):
    """What self and cross attention share: projections, norms over all heads, the call."""

    def __init__(
        self,
        config: TransformerConfig,
        attend: AttentionFunction,
        temporal_heads: Sequence[int] = (),
    ) -> None:
        super().__init__()
        dim = config.dim
        self.num_heads = config.num_heads
        self.attn_op = AttentionOp(attend, temporal_heads)
        self.q = Linear(dim, dim)
        self.k = Linear(dim, dim)
        self.v = Linear(dim, dim)
        self.o = Linear(dim, dim)
        self.norm_q = RMSNorm(dim, config.eps)
        self.norm_k = RMSNorm(dim, config.eps)

    def split_heads(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, D) -> (B, L, heads, D/heads)"""
        return x.unflatten(-1, (self.num_heads, -1))

    def pack(self, name: str, parts: Sequence[str]) -> None:
        """Put one layer `name` in place of several that have one input, unless it is there."""
        if hasattr(self, name):
            return
        linears = [getattr(self, part) for part in parts]
        if can_concatenate(linears):
            setattr(self, name, concatenate(linears))
            for part in parts:
                delattr(self, part)

    def project(self, x: Any, name: str, parts: Sequence[str]) -> Sequence[torch.Tensor]:
        """What the layers `parts` make of x, as one product where they have been packed."""
        packed = getattr(self, name, None)
        if packed is None:
            return [getattr(self, part)(x) for part in parts]
        return packed(x).chunk(len(parts), dim=-1)


class SelfAttention(Attention):
    PACKED = ("qkv", ("q", "k", "v"))

    @property
    def first(self) -> nn.Module:
        """The layer that takes the input."""
        return getattr(self, "qkv", None) or self.q

    def forward(self, x: torch.Tensor | Quantized, angles: Angles, frames: int) -> torch.Tensor:
        q, k, v = self.project(x, *self.PACKED)
        q = self.split_heads(self.norm_q(q, angles))
        k = self.split_heads(self.norm_k(k, angles))
        return self.o(self.attn_op(q, k, self.split_heads(v), frames=frames).flatten(2))


class CrossAttention(Attention):
    """Attention to text and, in models with CLIP, a second one to image tokens."""

    PACKED = ("kv", ("k", "v"))
    PACKED_IMAGE = ("kv_img", ("k_img", "v_img"))

    def __init__(self, config: TransformerConfig, attend: AttentionFunction) -> None:
        super().__init__(config, attend)
        self.has_image = config.image_dim is not None
        if self.has_image:
            self.k_img = Linear(config.dim, config.dim)
            self.v_img = Linear(config.dim, config.dim)
            self.norm_k_img = RMSNorm(config.dim, config.eps)

    def encode(self, context: Context) -> tuple[KeysValues, ...]:
        """Keys and values of the text and, where there are any, of images."""
        k, v = self.project(context.text, *self.PACKED)
        pairs = [(self.split_heads(self.norm_k(k)), self.split_heads(v))]
        if self.has_image:
            k, v = self.project(context.image, *self.PACKED_IMAGE)
            pairs.append((self.split_heads(self.norm_k_img(k)), self.split_heads(v)))
        return tuple(pairs)

    def forward(
        self, x: torch.Tensor | Quantized, context: Context | tuple[KeysValues, ...]
    ) -> torch.Tensor:
        q = self.split_heads(self.norm_q(self.q(x)))
        pairs = self.encode(context) if isinstance(context, Context) else context
        out, *others = (self.attn_op(q, k, v) for k, v in pairs)
        for other in others:
            out = out + other
        return self.o(out.flatten(2))


class Block(nn.Module):
    def __init__(
        self,
        config: TransformerConfig,
        attend: AttentionFunction,
        attend_cross: AttentionFunction,
        temporal_heads: Sequence[int] = (),
    ) -> None:
        super().__init__()
        dim = config.dim
        self.eps = config.eps
        self.self_attn = SelfAttention(config, attend, temporal_heads)
        self.norm3 = LayerNorm(dim, config.eps)
        self.cross_attn = CrossAttention(config, attend_cross)
        self.ffn = FeedForward(dim, config.ffn_dim)
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(
        self,
        x: torch.Tensor,
        time: torch.Tensor,
        angles: Angles,
        context: Context | tuple[KeysValues, ...],
        dtype: torch.dtype,
        frames: int,
    ) -> torch.Tensor:
        """The residual stream x (B, L, D) after this block.

        Args:
            time: (B, n, 6, D) float32.
            angles: of `rope_table`.
            context: tokens (B, Lt, D), or this block's keys and values of them.
            dtype: of the matrix products: the weights' or autocast's.
            frames: tokens along time.
        """
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (
            self.modulation.to(wide(self.modulation.dtype))[:, None] + time
        ).unbind(2)
        eps = self.eps
        out = input_kind(self.self_attn.first, dtype)
        h = norm(x, shift=shift, scale=scale, eps=eps, out=out)
        update = self.self_attn(h, angles, frames)
        out = input_kind(self.cross_attn.q, dtype)
        weight, bias = self.norm3.weight, self.norm3.bias
        x, h = add_norm(x, update, gate, weight=weight, bias=bias, eps=eps, out=out)
        update = self.cross_attn(h, context)
        out = input_kind(self.ffn[0], dtype)
        x, h = add_norm(x, update, shift=ffn_shift, scale=ffn_scale, eps=eps, out=out)
        return gated_add(x, self.ffn(h), ffn_gate)


class Head(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        kt, kh, kw = config.patch_size
        self.eps = config.eps
        self.head = Linear(config.dim, kt * kh * kw * config.out_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """x (B,L,D) and time (B,n,D) float32 -> (B, L, kt*kh*kw*out_dim)."""
        shift, scale = (
            self.modulation.to(wide(self.modulation.dtype))[:, None] + time[:, :, None]
        ).unbind(2)
        dtype = self.head.weight.dtype
        return self.head(norm(x, shift=shift, scale=scale, eps=self.eps, out=dtype))


class WanModel(nn.Module):
    """Predicts the rectified-flow velocity v = noise - x0 at x_t = (1-t) x0 + t noise.

    Args:
        config: the variant's shape.
        attention: back-end of self attention (`turbodit.attention.BACKENDS`). Cross
            attention is short and always dense.
        settings: of the back-end, e.g. {"ratio": 0.15} for "sla". "temporal_heads" are a list for
            each layer (`attention.temporal`).
        residual: dtype of the residual stream, "float32" as in Wan, or "bfloat16": fewer bytes
            to move, and rounding after each of a block's three additions.

    Raises:
        ValueError: unknown back-end, setting or residual.
    """

    def __init__(
        self,
        config: TransformerConfig,
        attention: str = "sdpa",
        settings: Mapping[str, Any] | None = None,
        residual: Residual = "float32",
    ) -> None:
        super().__init__()
        if residual not in get_args(Residual):
            raise ValueError(
                f"unknown residual {residual!r}; supported: {', '.join(get_args(Residual))}"
            )
        self.config = config
        self.residual = residual
        temporal_heads = (settings or {}).get(TEMPORAL_HEADS, [()] * config.num_layers)
        check_temporal_heads(temporal_heads, config.num_layers, config.num_heads)
        dim = config.dim
        self.patch_embedding = nn.Conv3d(
            config.in_dim, dim, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(
            nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.img_emb: ImageEmbedding | None = None
        if config.image_dim is not None:
            self.img_emb = ImageEmbedding(config.image_dim, dim, config.image_positions)
        attend_cross = attention_function("sdpa", cross=True)
        self.blocks = nn.ModuleList(
            Block(
                config,
                attention_function(attention, head_dim=config.head_dim, **(settings or {})),
                attend_cross,
                heads,
            )
            for heads in temporal_heads
        )
        self.head = Head(config)

    @staticmethod
    def keep_float32(name: str) -> bool:
        """Whether parameter `name` stays float32 in a half-precision model, as in Wan."""
        kept = ("norm", "modulation", "proj_l")
        return name.startswith("time_") or any(part in name for part in kept)

    def pack_projections(self) -> None:
        """Compute q, k and v in one matrix product, and k and v of the context: for inference.

        Parameters change their names, so a packed model can be neither saved nor filled.
        """
        for block in self._blocks():
            block.self_attn.pack(*SelfAttention.PACKED)
            block.cross_attn.pack(*CrossAttention.PACKED)
            if block.cross_attn.has_image:
                block.cross_attn.pack(*CrossAttention.PACKED_IMAGE)

    def angles(self, latents: torch.Tensor) -> Angles:
        """Cosines and sines of the rotary positions of the tokens of latents (B, C, T, H, W).

        Computed once for a size, and kept for some sizes.
        """
        t, h, w = (n // p for n, p in zip(latents.shape[2:], self.config.patch_size, strict=True))
        return rope_table((t, h, w), self.config.head_dim, latents.device)

    def encode_context(
        self, context: torch.Tensor, image_context: torch.Tensor | None = None
    ) -> EncodedContext:
        """What `forward` takes in place of a context, so that its steps share this work.

        Args and errors as `forward`.
        """
        self._check_context(context, image_context)
        tokens = self._embed_context(context, image_context)
        return EncodedContext(tuple(block.cross_attn.encode(tokens) for block in self._blocks()))

    def forward(
        self,
        latents: torch.Tensor,
        t: torch.Tensor,
        context: torch.Tensor | EncodedContext,
        image_context: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Velocity at `latents`.

        Args:
            latents: (B, in_dim, T, H, W); channel-conditioned models get their mask and
                condition concatenated here.
            t: rectified-flow time in [0, 1], (B,), or (B, n) with n dividing the number of
                tokens L: t[:, i] is the time of the i-th run of L/n tokens (n = T: one
                time per latent frame; n = L: one per token).
            context: text embeddings (B, text_len, text_dim), zeros past the prompt's end; or
                what `encode_context` made of them and of the image context.
            image_context: CLIP features (B, 257 or 514, image_dim), for models that have them.

        Returns:
            (B, out_dim, T, H, W) in the dtype of the weights.

        Raises:
            ValueError: shapes that do not fit this model.
        """
        grid = self._grid(latents, t)
        weight = self.patch_embedding.weight
        # A convolution whose stride is its kernel is a linear map of the patches.
        tokens = patchify(latents.to(weight.dtype), self.config.patch_size)
        tokens = F.linear(tokens, weight.flatten(1), self.patch_embedding.bias)
        residual = wide(tokens.dtype) if self.residual == "float32" else torch.bfloat16
        x = tokens.to(residual)
        time, modulation = self._embed_time(t.reshape(t.shape[0], -1))
        layers: Sequence[Context | tuple[KeysValues, ...]]
        if isinstance(context, EncodedContext):
            layers = context.layers
        else:
            self._check_context(context, image_context)
            layers = [self._embed_context(context, image_context)] * len(self.blocks)
        angles = self.angles(latents)
        for block, seen in zip(self.blocks, layers, strict=True):
            x = block(x, modulation, angles, seen, tokens.dtype, grid[0])
        return unpatchify(self.head(x, time), grid, self.config.patch_size)

    def _blocks(self) -> list[Block]:
        return cast("list[Block]", list(self.blocks))

    def _embed_context(self, context: torch.Tensor, image_context: torch.Tensor | None) -> Context:
        """Text and image embeddings as tokens of the model's width."""
        text = self.text_embedding(context.to(self.patch_embedding.weight.dtype))
        image = None
        if self.img_emb is not None and image_context is not None:
            image = self.img_emb(image_context)
        return Context(text, image)

    def _embed_time(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """t (B, n) -> embedding (B, n, D) and block modulation (B, n, 6, D), float32."""
        with torch.autocast(t.device.type, enabled=False):
            sinusoid = timestep_embedding(1000 * t, self.config.freq_dim)
            time = self.time_embedding(sinusoid.to(next(self.time_embedding.parameters()).dtype))
            modulation = self.time_projection(time).unflatten(-1, (6, -1))
            return time.to(wide(time.dtype)), modulation.to(wide(time.dtype))

    def _check_context(self, context: torch.Tensor, image_context: torch.Tensor | None) -> None:
        c = self.config
        if context.ndim != 3 or context.shape[-1] != c.text_dim:
            raise ValueError(
                f"context has shape {tuple(context.shape)}, expected (B, text_len, {c.text_dim})"
            )
        if (image_context is None) != (c.image_dim is None):
            state = "needs" if c.image_dim is not None else "has no use for"
            raise ValueError(f"this model {state} image_context (CLIP features)")

    def _grid(self, latents: torch.Tensor, t: torch.Tensor) -> tuple[int, int, int]:
        """Tokens along time, height, width; raises where an input does not fit the model."""
        c = self.config
        if latents.ndim != 5 or latents.shape[1] != c.in_dim:
            raise ValueError(
                f"latents have shape {tuple(latents.shape)}, expected (B, {c.in_dim}, T, H, W)"
            )
        if any(size % patch for size, patch in zip(latents.shape[2:], c.patch_size, strict=True)):
            raise ValueError(
                f"latent size {tuple(latents.shape[2:])} is not a multiple of patch {c.patch_size}"
            )
        frames, height, width = (
            size // patch for size, patch in zip(latents.shape[2:], c.patch_size, strict=True)
        )
        tokens = frames * height * width
        batch = latents.shape[0]
        if t.ndim not in (1, 2) or t.shape[0] != batch or tokens % (t.numel() // batch):
            raise ValueError(
                f"t has shape {tuple(t.shape)}, expected ({batch},) or ({batch}, n) with n "
                f"dividing {tokens} tokens"
            )
        return frames, height, width

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Fresh weights for training from scratch: Wan's initialisation.

        Xavier-uniform linear layers with zero biases, normal(0.02) text and time
        embeddings, and a zero output head, so that the first prediction is zero.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                nn.init.zeros_(module.bias)
            elif isinstance(module, (RMSNorm, LayerNorm)) and module.weight is not None:
                nn.init.ones_(module.weight)
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1), generator=generator)
        if self.patch_embedding.bias is not None:
            nn.init.zeros_(self.patch_embedding.bias)
        for layer in (*self.text_embedding, *self.time_embedding):
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02, generator=generator)
        for owner in (*self.blocks, self.head):
            nn.init.normal_(owner.modulation, std=self.config.dim**-0.5, generator=generator)
        nn.init.zeros_(self.head.head.weight)
