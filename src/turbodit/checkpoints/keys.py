"""Parameter names of the Wan DiT: the original ones, which are ours, and diffusers'.

One table, read in both directions. Names that it does not know pass unchanged, so that
whoever fills a model can report them as they stand in the file.
"""

from __future__ import annotations

# Modules and single parameters outside the blocks: original -> diffusers.
OUTER = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
# The same within "blocks.N.". norm2 of the one is norm3 of the other.
IN_BLOCK = {
    "self_attn.q": "attn1.to_q",
    "self_attn.k": "attn1.to_k",
    "self_attn.v": "attn1.to_v",
    "self_attn.o": "attn1.to_out.0",
    "self_attn.norm_q": "attn1.norm_q",
    "self_attn.norm_k": "attn1.norm_k",
    # diffusers has no name for it: ours follows the pattern of its names.
    "self_attn.attn_op.local_attn.proj_l": "attn1.attn_op.local_attn.proj_l",
    "norm3": "norm2",
    "cross_attn.q": "attn2.to_q",
    "cross_attn.k": "attn2.to_k",
    "cross_attn.v": "attn2.to_v",
    "cross_attn.o": "attn2.to_out.0",
    "cross_attn.norm_q": "attn2.norm_q",
    "cross_attn.norm_k": "attn2.norm_k",
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "modulation": "scale_shift_table",
}
OUTER_BACK = {theirs: ours for ours, theirs in OUTER.items()}
IN_BLOCK_BACK = {theirs: ours for ours, theirs in IN_BLOCK.items()}


def to_diffusers(name: str) -> str:
    """The diffusers name of the parameter that the original code calls `name`."""
    return _translate(name, OUTER, IN_BLOCK)


def to_native(name: str) -> str:
    """The original name of the parameter that diffusers calls `name`."""
    return _translate(name, OUTER_BACK, IN_BLOCK_BACK)


def _translate(name: str, outer: dict[str, str], in_block: dict[str, str]) -> str:
    prefix, table = "", outer
    if name.startswith("blocks."):
        _, index, name = name.split(".", 2)
        prefix, table = f"blocks.{index}.", in_block
    if name in table:  # a parameter of its own, such as a modulation table
        return prefix + table[name]
    module, _, parameter = name.rpartition(".")
    return f"{prefix}{table[module]}.{parameter}" if module in table else prefix + name
