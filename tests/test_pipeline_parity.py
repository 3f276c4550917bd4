"""The same noise and the same steps give what diffusers' pipelines give."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
)
from PIL import Image
from tests.tiny_models import (
    BOUNDARY,
    WITH_CLIP,
    tiny_diffusers_folder,
    tiny_image_encoder,
    tiny_image_processor,
    tiny_text_encoder,
    tiny_tokenizer,
    tiny_transformer,
    tiny_vae,
)

from turbodit.pipeline import Pipeline
from turbodit.sampling import gaussian_noise

WIDTH, HEIGHT, FRAMES, SHIFT = 64, 32, 9, 3.0
HIGH_GUIDANCE, GUIDANCE = 4.0, 2.5
SEEDS, STEPS = [11, 12], 6
PROMPTS, NEGATIVE = ["a red fox jumps", "the cat"], "blue car"
TOLERANCE = 5e-6  # relative, float32; ten times what we see

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": SHIFT}
SCHEDULERS = {
    "unipc": lambda: UniPCMultistepScheduler(num_train_timesteps=1000, **FLOW),
    "euler": lambda: FlowMatchEulerDiscreteScheduler(shift=SHIFT),
    "dpm++": lambda: DPMSolverMultistepScheduler(num_train_timesteps=1000, **FLOW),
}


def picture(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def ours(pipe, **options):
    """Latents (B, C, T, H, W), and frames (B, T, H, W, 3) uint8."""
    caught = []
    decode = pipe._decode
    pipe._decode = lambda latents, report: caught.append(latents) or decode(latents, report)
    videos = pipe(
        PROMPTS, negative_prompt=NEGATIVE, width=WIDTH, height=HEIGHT, frames=FRAMES, **options
    )
    return caught[0], np.stack([video.frames for video in videos])


def theirs(pipe, noise, **options):
    """Latents (B, C, T, H, W), and frames (B, T, H, W, 3) float in [0, 1]."""
    pipe.set_progress_bar_config(disable=True)
    latents, frames = (
        pipe(
            prompt=PROMPTS,
            negative_prompt=[NEGATIVE] * len(PROMPTS),
            width=WIDTH,
            height=HEIGHT,
            num_frames=FRAMES,
            latents=noise,
            output_type=kind,
            **options,
        ).frames
        for kind in ("latent", "np")
    )
    return latents, frames


def reference(variant, pipeline_class, solver):
    """diffusers' pipeline over the models that `tiny_diffusers_folder` writes."""
    parts = {
        "tokenizer": tiny_tokenizer(),
        "text_encoder": tiny_text_encoder(),
        "vae": tiny_vae("2.2" if variant == "ti2v" else "2.1"),
        "scheduler": SCHEDULERS[solver](),
        "transformer": tiny_transformer(variant),
        "expand_timesteps": variant == "ti2v",
    }
    if variant in BOUNDARY:
        parts["transformer_2"] = tiny_transformer(variant, seed=1)
        parts["boundary_ratio"] = BOUNDARY[variant]
    if variant in WITH_CLIP:
        parts["image_encoder"] = tiny_image_encoder()
        parts["image_processor"] = tiny_image_processor()
    return pipeline_class(**parts)


@pytest.mark.parametrize(
    ("variant", "pictures", "solver"),
    [
        ("t2v", 0, "unipc"),
        ("t2v", 0, "euler"),
        ("t2v", 0, "dpm++"),
        ("t2v-a14b", 0, "unipc"),
        ("ti2v", 0, "unipc"),
        ("ti2v", 1, "unipc"),
        ("ti2v", 1, "euler"),
        ("ti2v", 1, "dpm++"),
        ("i2v-a14b", 1, "unipc"),
        ("i2v-a14b", 2, "unipc"),
        ("i2v", 1, "unipc"),
        ("flf2v", 2, "unipc"),
    ],
)
def test_latents_and_video_are_those_of_diffusers(tmp_path, variant, pictures, solver):
    pipe = Pipeline.from_pretrained(
        tiny_diffusers_folder(tmp_path, variant), device="cpu", dtype=torch.float32
    )
    two_experts = variant in BOUNDARY
    images = dict(zip(("image", "last_image"), map(picture, range(pictures)), strict=False))
    latents, frames = ours(
        pipe,
        **images,
        seed=SEEDS,
        solver=solver,
        steps=STEPS,
        shift=SHIFT,
        guidance=GUIDANCE,
        guidance_high_noise=HIGH_GUIDANCE if two_experts else None,
    )
    shape = pipe.model.latent_shape(FRAMES, HEIGHT, WIDTH)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    expected_latents, expected_frames = theirs(
        reference(variant, WanImageToVideoPipeline if images else WanPipeline, solver),
        gaussian_noise(shape, generators, "cpu"),
        **images,
        num_inference_steps=STEPS,
        guidance_scale=HIGH_GUIDANCE if two_experts else GUIDANCE,
        guidance_scale_2=GUIDANCE if two_experts else None,
    )
    error = (latents - expected_latents).norm() / expected_latents.norm()
    assert error < TOLERANCE
    # Ours are rounded to 8 bits.
    np.testing.assert_allclose(frames / 255, expected_frames, atol=0.51 / 255)
