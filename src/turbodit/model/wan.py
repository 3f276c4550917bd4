"""The Wan diffusion transformer, all variants in one network (Wan, arXiv:2503.20314).

T2V, I2V with CLIP, first-last-frame, A14B experts (condition on channels, no CLIP) and
TI2V (time per latent frame) differ only in `TransformerConfig`. Parameter names are those
of the original checkpoints, so native files load without a map.

Shapes: B batch; C,T,H,W latents; L tokens; D width; n runs of tokens with a time each.
Precision: residual stream, norms, modulation and time embedding in float32; the matrix
products in the dtype of the weights (or of autocast).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from turbodit.attention import AttentionFunction, attention_function
from turbodit.config import TransformerConfig
from turbodit.model.layers import (
    ImageEmbedding,
    LayerNorm,
    RMSNorm,
    gated,
    modulate,
    patchify,
    timestep_embedding,
    unpatchify,
)
from turbodit.model.rope import apply_rope, rope_table

RopeTable = tuple[torch.Tensor, torch.Tensor]


class AttentionOp(nn.Module):
    """The attention call of a layer: what a back-end with parameters is a submodule of.

    It bears TurboDiffusion's names (`attn_op.local_attn.proj_l.weight`), and is where a hook
    finds q, k, v (B, L, heads, D).
    """

    def __init__(self, attend: AttentionFunction) -> None:
        super().__init__()
        self.local_attn = attend

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self.local_attn(q, k, v)


class SelfAttention(nn.Module):
    def __init__(self, config: TransformerConfig, attend: AttentionFunction) -> None:
        super().__init__()
        dim = config.dim
        self.num_heads = config.num_heads
        self.attn_op = AttentionOp(attend)
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = RMSNorm(dim, config.eps)
        self.norm_k = RMSNorm(dim, config.eps)

    def split_heads(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, D) -> (B, L, heads, D/heads)"""
        return x.unflatten(-1, (self.num_heads, -1))

    def forward(self, x: torch.Tensor, rope: RopeTable) -> torch.Tensor:
        q = apply_rope(self.split_heads(self.norm_q(self.q(x))), rope)
        k = apply_rope(self.split_heads(self.norm_k(self.k(x))), rope)
        v = self.split_heads(self.v(x))
        return self.o(self.attn_op(q, k, v).flatten(2))


class CrossAttention(SelfAttention):
    """Attention to text and, in models with CLIP, a second one to image tokens."""

    def __init__(self, config: TransformerConfig, attend: AttentionFunction) -> None:
        super().__init__(config, attend)
        self.k_img: nn.Linear | None = None
        if config.image_dim is not None:
            self.k_img = nn.Linear(config.dim, config.dim)
            self.v_img = nn.Linear(config.dim, config.dim)
            self.norm_k_img = RMSNorm(config.dim, config.eps)

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, text: torch.Tensor, image: torch.Tensor | None
    ) -> torch.Tensor:
        q = self.split_heads(self.norm_q(self.q(x)))
        k = self.split_heads(self.norm_k(self.k(text)))
        out = self.attn_op(q, k, self.split_heads(self.v(text)))
        if self.k_img is not None and image is not None:
            k_img = self.split_heads(self.norm_k_img(self.k_img(image)))
            out = out + self.attn_op(q, k_img, self.split_heads(self.v_img(image)))
        return self.o(out.flatten(2))


class Block(nn.Module):
    def __init__(
        self, config: TransformerConfig, attend: AttentionFunction, attend_cross: AttentionFunction
    ) -> None:
        super().__init__()
        dim = config.dim
        self.norm1 = LayerNorm(dim, config.eps, elementwise_affine=False)
        self.self_attn = SelfAttention(config, attend)
        self.norm3 = LayerNorm(dim, config.eps)
        self.cross_attn = CrossAttention(config, attend_cross)
        self.norm2 = LayerNorm(dim, config.eps, elementwise_affine=False)
        self.ffn = nn.Sequential(
            nn.Linear(dim, config.ffn_dim),
            nn.GELU(approximate="tanh"),
            nn.Linear(config.ffn_dim, dim),
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(
        self,
        x: torch.Tensor,
        time: torch.Tensor,
        rope: RopeTable,
        text: torch.Tensor,
        image: torch.Tensor | None,
    ) -> torch.Tensor:
        """x (B,L,D) float32, time (B,n,6,D) float32, text (B,Lt,D) -> (B,L,D) float32."""
        dtype = text.dtype  # of the matrix products: the weights' dtype or autocast's
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (
            self.modulation.float()[:, None] + time
        ).unbind(2)
        attn_in = modulate(self.norm1(x), shift, scale).to(dtype)
        x = x + gated(self.self_attn(attn_in, rope), gate)
        x = x + self.cross_attn(self.norm3(x).to(dtype), text, image)
        ffn_in = modulate(self.norm2(x), ffn_shift, ffn_scale).to(dtype)
        return x + gated(self.ffn(ffn_in), ffn_gate)


class Head(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        kt, kh, kw = config.patch_size
        self.norm = LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.head = nn.Linear(config.dim, kt * kh * kw * config.out_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """x (B,L,D) and time (B,n,D), both float32 -> (B, L, kt*kh*kw*out_dim)."""
        shift, scale = (self.modulation.float()[:, None] + time[:, :, None]).unbind(2)
        return self.head(modulate(self.norm(x), shift, scale).to(self.head.weight.dtype))


class WanModel(nn.Module):
    """Predicts the rectified-flow velocity v = noise - x0 at x_t = (1-t) x0 + t noise.

    Args:
        config: the variant's shape.
        attention: back-end of self attention (`turbodit.attention.BACKENDS`). Cross
            attention is short and always dense.
        settings: of the back-end, e.g. {"ratio": 0.15} for "sla".

    Raises:
        ValueError: unknown back-end or setting.
    """

    def __init__(
        self,
        config: TransformerConfig,
        attention: str = "sdpa",
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
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
            )
            for _ in range(config.num_layers)
        )
        self.head = Head(config)

    @staticmethod
    def keep_float32(name: str) -> bool:
        """Whether parameter `name` stays float32 in a half-precision model, as in Wan."""
        kept = ("norm", "modulation", "proj_l")
        return name.startswith("time_") or any(part in name for part in kept)

    def forward(
        self,
        latents: torch.Tensor,
        t: torch.Tensor,
        context: torch.Tensor,
        image_context: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Velocity at `latents`.

        Args:
            latents: (B, in_dim, T, H, W); channel-conditioned models get their mask and
                condition concatenated here.
            t: rectified-flow time in [0, 1], (B,), or (B, n) with n dividing the number of
                tokens L: t[:, i] is the time of the i-th run of L/n tokens (n = T: one
                time per latent frame; n = L: one per token).
            context: text embeddings (B, text_len, text_dim), zeros past the prompt's end.
            image_context: CLIP features (B, 257 or 514, image_dim), for models that have them.

        Returns:
            (B, out_dim, T, H, W) in the dtype of the weights.

        Raises:
            ValueError: shapes that do not fit this model.
        """
        grid = self._grid(latents, t, context, image_context)
        weight = self.patch_embedding.weight
        # A convolution whose stride is its kernel is a linear map of the patches.
        tokens = patchify(latents.to(weight.dtype), self.config.patch_size)
        x = F.linear(tokens, weight.flatten(1), self.patch_embedding.bias).float()
        time, modulation = self._embed_time(t.reshape(t.shape[0], -1))
        text = self.text_embedding(context.to(weight.dtype))
        image = None
        if self.img_emb is not None and image_context is not None:
            image = self.img_emb(image_context)
        rope = rope_table(grid, self.config.head_dim, latents.device)
        for block in self.blocks:
            x = block(x, modulation, rope, text, image)
        return unpatchify(self.head(x, time), grid, self.config.patch_size)

    def _embed_time(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """t (B, n) -> embedding (B, n, D) and block modulation (B, n, 6, D), float32."""
        with torch.autocast(t.device.type, enabled=False):
            sinusoid = timestep_embedding(1000 * t, self.config.freq_dim)
            time = self.time_embedding(sinusoid.to(next(self.time_embedding.parameters()).dtype))
            return time.float(), self.time_projection(time).unflatten(-1, (6, -1)).float()

    def _grid(
        self,
        latents: torch.Tensor,
        t: torch.Tensor,
        context: torch.Tensor,
        image_context: torch.Tensor | None,
    ) -> tuple[int, int, int]:
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
        if context.ndim != 3 or context.shape[-1] != c.text_dim:
            raise ValueError(
                f"context has shape {tuple(context.shape)}, expected (B, text_len, {c.text_dim})"
            )
        if (image_context is None) != (c.image_dim is None):
            state = "needs" if c.image_dim is not None else "has no use for"
            raise ValueError(f"this model {state} image_context (CLIP features)")
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
