"""Images to CLIP features: the ViT-H/14 of Wan2.1's image-to-video models, on transformers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from turbodit.weights import Weights, load_transformers_model, read_weights

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import CLIPImageProcessorPil, CLIPVisionModel

HEAD_DIM = 80  # of ViT-H/14; not to be read from the shapes of its weights

# Names in models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth, under "visual.", ->
# names in CLIPVisionModel. The joint q, k, v projection is split; the rest is shared.
RENAMES = {
    "patch_embedding": "embeddings.patch_embedding",
    "pre_norm": "pre_layrnorm",
    "post_norm": "post_layernorm",
}
EMBEDDINGS = {  # stored with leading dimensions of 1
    "cls_embedding": "embeddings.class_embedding",
    "pos_embedding": "embeddings.position_embedding.weight",
}
LAYER_RENAMES = {
    "norm1": "layer_norm1",
    "attn.proj": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
}


class ImageEncoder:
    """CLIP's vision tower up to its second-to-last layer.

    Args:
        model: the network.
        processor: resizes, crops and normalises images.
    """

    def __init__(self, model: CLIPVisionModel, processor: CLIPImageProcessorPil) -> None:
        self.model = model.eval()
        self.processor = processor

    @classmethod
    def from_pretrained(
        cls,
        encoder: Path | str,
        processor: Path | str | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> ImageEncoder:
        """Load a transformers folder and its processor's folder, or Wan's original CLIP file.

        Args:
            encoder: `image_encoder/` folder, or
                `models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth`.
            processor: `image_processor/` folder; with None, images are squeezed to the
                network's square as Wan's original code does.

        Raises:
            FileNotFoundError: no such folder or file, or no weights in it.
            ValueError: truncated file, or weights that do not fit.
        """
        # The plain-PIL class: the default one needs torchvision.
        from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

        encoder = Path(encoder)
        weights = read_weights(encoder)
        if encoder.is_dir():
            config = CLIPVisionConfig.from_pretrained(encoder, local_files_only=True)
        else:
            config, weights = _from_native(weights)
        model = load_transformers_model(CLIPVisionModel, config, weights, encoder, dtype)
        if processor is None:
            side = config.image_size
            images = CLIPImageProcessorPil(
                size={"height": side, "width": side}, do_center_crop=False
            )
        elif Path(processor).is_dir():
            images = CLIPImageProcessorPil.from_pretrained(processor, local_files_only=True)
        else:
            raise FileNotFoundError(f"no image processor folder at {processor}")
        return cls(model.to(device), images)

    def to(self, *args: Any, **kwargs: Any) -> ImageEncoder:
        """Move or cast the network, as `torch.nn.Module.to` does."""
        self.model.to(*args, **kwargs)
        return self

    @torch.no_grad()
    def encode(self, images: list[Image]) -> torch.Tensor:
        """Features (B, tokens, dim) of the second-to-last layer: (B, 257, 1280) of ViT-H/14."""
        pixels = self.processor(images=images, return_tensors="pt").pixel_values
        pixels = pixels.to(self.model.device, self.model.dtype)
        return self.model(pixels, output_hidden_states=True).hidden_states[-2]


def _from_native(weights: Weights) -> tuple[Any, Weights]:
    """CLIPVisionModel's configuration and weights from those of Wan's original file."""
    from transformers import CLIPVisionConfig

    visual = {
        name.removeprefix("visual."): weights[name]
        for name in weights
        if name.startswith("visual.") and name != "visual.head"
    }
    layers = {name.split(".")[1] for name in visual if name.startswith("transformer.")}
    if "patch_embedding.weight" not in visual or not layers:
        raise ValueError(
            "expected Wan's CLIP file (with visual.patch_embedding.weight), "
            f"found names such as {', '.join(list(weights)[:5])}"
        )
    dim, _, patch, _ = visual["patch_embedding.weight"].shape
    grid = round((visual["pos_embedding"].shape[1] - 1) ** 0.5)
    config = CLIPVisionConfig(
        hidden_size=dim,
        intermediate_size=visual["transformer.0.mlp.0.weight"].shape[0],
        num_hidden_layers=len(layers),
        num_attention_heads=dim // HEAD_DIM,
        image_size=grid * patch,
        patch_size=patch,
        hidden_act="gelu",
    )
    return config, _rename(visual)


def _rename(visual: Weights) -> dict[str, torch.Tensor]:
    renamed: dict[str, torch.Tensor] = {}
    for name, tensor in visual.items():
        module, _, parameter = name.rpartition(".")
        if name in EMBEDDINGS:
            renamed[EMBEDDINGS[name]] = tensor.squeeze()
        elif not name.startswith("transformer."):
            renamed[f"{RENAMES.get(module, module)}.{parameter}"] = tensor
        else:
            _, index, module = module.split(".", 2)
            layer = f"encoder.layers.{index}"
            if module == "attn.to_qkv":
                for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                    renamed[f"{layer}.self_attn.{part}_proj.{parameter}"] = piece
            else:
                renamed[f"{layer}.{LAYER_RENAMES.get(module, module)}.{parameter}"] = tensor
    return renamed
