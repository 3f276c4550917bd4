"""What only a GPU can show. Tolerances come from the error of the same precision on a CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm
from PIL import Image
from torch import nn
from torch.func import functional_call

from turbodit.checkpoints.folder import EMBEDDED
from turbodit.config import PRESETS, TransformerConfig
from turbodit.model.wan import WanModel
from turbodit.pipeline import Pipeline
from turbodit.random_models import random_pipeline
from turbodit.sampling import gaussian_noise
from turbodit.spritewan import train_teacher, train_vae
from turbodit.spritewan.train_vae import (
    VAE_CONFIG,
    ClipAutoencoder,
    NormSiLU,
    autoencoder_loss,
    fuse_norms,
    to_signed,
)
from turbodit.spritewan.trainer import Metrics, Trainer, repeatable
from turbodit.spritewan.world import HELD_OUT, render, scene
from turbodit.text_encoder import TextEncoder
from turbodit.vae import VideoVAE

pytestmark = pytest.mark.gpu

FOLDER = EMBEDDED["spritewan"].path
CUDA = torch.device("cuda")
SHORT = {"frames": 9, "steps": 3, "seed": 5}
TINY_VAE = {**VAE_CONFIG, "base_dim": 8, "decoder_base_dim": 8}


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    got, want = got.double().cpu(), want.double().cpu()
    return ((got - want).norm() / want.norm()).item()


# The networks, against a CPU.


@pytest.mark.parametrize("per_frame", [False, True])
def test_the_dit_in_bfloat16_is_as_exact_as_on_a_cpu(per_frame: bool) -> None:
    config = TransformerConfig(
        dim=128, ffn_dim=256, num_heads=2, num_layers=4, text_dim=48, text_len=20
    )
    torch.manual_seed(0)
    exact = WanModel(config).eval().double()
    for name, p in exact.named_parameters():
        nn.init.normal_(p, mean=1.0 if "norm" in name and "weight" in name else 0.0, std=0.1)
    half = copy.deepcopy(exact)
    for name, p in half.named_parameters():
        p.data = p.data.float() if half.keep_float32(name) else p.data.bfloat16()
    latents = torch.randn(2, 16, 3, 14, 10)
    context = torch.randn(2, 20, 48)
    t = torch.tensor([[0.0, 0.9, 0.9], [0.3, 0.3, 0.3]]) if per_frame else torch.tensor([0.9, 0.3])
    with torch.no_grad():
        want = exact(latents.double(), t, context.double())
        on_cpu = half(latents.bfloat16(), t, context.bfloat16())
        half.to(CUDA)
        on_gpu = half(latents.to(CUDA).bfloat16(), t.to(CUDA), context.to(CUDA).bfloat16())
    assert on_gpu.device.type == "cuda" and on_gpu.dtype == torch.bfloat16
    assert relative_error(on_gpu, want) <= 2 * relative_error(on_cpu, want)


@pytest.fixture(scope="module")
def latents() -> torch.Tensor:
    """Of a held-out clip of 9 frames and 128x128 pixels."""
    video = to_signed(render([scene(HELD_OUT)], frames=9))[..., 64:192, 64:192]
    return VideoVAE.from_pretrained(FOLDER / "vae").encode(video)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoded_chunks_are_as_exact_as_on_a_cpu(latents: torch.Tensor, dtype: torch.dtype) -> None:
    want = VideoVAE.from_pretrained(FOLDER / "vae").decode(latents)
    on_cpu = VideoVAE.from_pretrained(FOLDER / "vae", torch.bfloat16).decode(latents)
    vae = VideoVAE.from_pretrained(FOLDER / "vae", dtype, CUDA)
    chunks = list(vae.decode_chunks(latents.to(CUDA)))
    assert [chunk.shape[2] for chunk in chunks] == [1, 4, 4]
    assert all(chunk.device.type == "cuda" for chunk in chunks)
    # A GPU's float32 convolutions may be TF32: three more bits than bfloat16.
    tolerance = relative_error(on_cpu, want) * (2 if dtype == torch.bfloat16 else 0.5)
    assert relative_error(torch.cat(chunks, dim=2), want) <= tolerance


def test_encoded_latents_are_as_exact_as_on_a_cpu() -> None:
    video = to_signed(render([scene(HELD_OUT + 1)], frames=5))[..., 64:192, 64:192]
    want = VideoVAE.from_pretrained(FOLDER / "vae").encode(video)
    on_cpu = VideoVAE.from_pretrained(FOLDER / "vae", torch.bfloat16).encode(video)
    on_gpu = VideoVAE.from_pretrained(FOLDER / "vae", torch.bfloat16, CUDA).encode(video.to(CUDA))
    assert relative_error(on_gpu, want) <= 2 * relative_error(on_cpu, want)


def test_text_embeddings_are_as_exact_as_on_a_cpu() -> None:
    shape = PRESETS["spritewan"].transformer

    def encoder(dtype: torch.dtype, device: torch.device | str) -> TextEncoder:
        parts = (FOLDER / "text_encoder", FOLDER / "tokenizer")
        return TextEncoder.from_pretrained(*parts, shape.text_len, dtype, device)

    prompts = [scene(HELD_OUT).caption, "a cat"]
    want = encoder(torch.float32, "cpu").encode(prompts)
    on_cpu = encoder(torch.bfloat16, "cpu").encode(prompts)
    on_gpu = encoder(torch.bfloat16, CUDA).encode(prompts)
    assert on_gpu.device.type == "cuda" and on_gpu.shape == (2, shape.text_len, shape.text_dim)
    assert relative_error(on_gpu, want) <= 2 * relative_error(on_cpu, want)
    padding = (want == 0).all(dim=-1)
    assert padding.any() and (on_gpu.cpu()[padding] == 0).all()


def test_noise_is_the_same_on_every_device() -> None:
    drawn = []
    for device in ("cpu", CUDA):
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        first = gaussian_noise((3, 4, 5), generators, device)
        assert first.device.type == torch.device(device).type
        drawn.append(torch.stack([first, gaussian_noise((3, 4, 5), generators, device)]).cpu())
    assert torch.equal(*drawn)


# The pipeline.


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.from_pretrained("spritewan-teacher")


def test_the_same_seed_gives_the_same_bytes(pipe: Pipeline) -> None:
    assert pipe.device.type == "cuda", "a GPU is the default where there is one"
    first, second = (pipe("a large fox runs to the right", **SHORT).frames for _ in range(2))
    assert first.shape == (9, 256, 256, 3) and first.std() > 10
    np.testing.assert_array_equal(first, second)
    other = pipe("a large fox runs to the right", **SHORT | {"seed": 6}).frames
    assert (first != other).any()


def test_the_default_gives_the_same_bytes_twice() -> None:
    pipe = Pipeline.from_pretrained()
    first, second = (pipe("a large fox runs to the right", **SHORT).frames for _ in range(2))
    assert first.shape == (9, 256, 256, 3)
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("solver", ["unipc", "few-step"])
def test_a_video_is_that_of_a_cpu(pipe: Pipeline, solver: str) -> None:
    """In float32; the steps that follow a difference of rounding make it larger."""
    prompt, settings = "a small cat jumps in the snow", {**SHORT, "solver": solver}
    on_cpu, on_gpu = (
        Pipeline.from_pretrained("spritewan-teacher", device=device, dtype=torch.float32)
        for device in ("cpu", "cuda")
    )
    want, got = (p(prompt, **settings).frames.astype(int) for p in (on_cpu, on_gpu))
    half = pipe(prompt, **settings).frames.astype(int)
    assert np.abs(got - want).mean() <= np.abs(half - want).mean()
    assert np.abs(got - want).mean() < 2


@pytest.mark.parametrize("with_image", [False, True])
@pytest.mark.parametrize("mode", ["model", "sequential"])
def test_offloading_changes_no_frame(pipe: Pipeline, mode: str, with_image: bool) -> None:
    one = scene(HELD_OUT)
    settings = dict(SHORT)
    if with_image:
        still = render([one], frames=1)[0, 0].permute(1, 2, 0).numpy()
        settings["image"] = Image.fromarray(still)
    expected = pipe(one.caption, **settings)
    offloaded = Pipeline.from_pretrained("spritewan-teacher", offload=mode)
    np.testing.assert_array_equal(offloaded(one.caption, **settings).frames, expected.frames)
    networks = [offloaded.transformers["transformer"], offloaded.vae.model]
    assert all(p.device.type == "cpu" for network in networks for p in network.parameters())


def test_peak_memory_holds_the_weights_and_grows_with_the_clip(pipe: Pipeline) -> None:
    pipe("a cat", **SHORT)
    (dit,) = pipe.transformers.values()
    weights = sum(p.nbytes for p in dit.parameters())
    peak = pipe.peak_memory
    assert peak is not None and weights < peak < torch.cuda.mem_get_info()[1]
    pipe("a cat", **SHORT | {"frames": 33})
    assert pipe.peak_memory > peak


@pytest.mark.parametrize("mode", ["none", "sequential"])
def test_random_weights_make_a_finite_video(mode: str) -> None:
    model = PRESETS["Wan2.2-T2V-A14B"]
    shape = replace(model.transformer, dim=256, ffn_dim=512, num_heads=2, num_layers=2)
    pipe = random_pipeline(replace(model, transformer=shape), offload=mode)
    video = pipe("noise", seed=0, width=128, height=64, frames=5, steps=3)
    assert video.frames.shape == (5, 64, 128, 3)
    assert pipe.peak_memory > 0
    home = "cpu" if mode == "sequential" else "cuda"
    for network in pipe.transformers.values():
        assert next(network.blocks.parameters()).device.type == home
        assert network.head.head.weight.dtype == torch.bfloat16


# The autoencoder's training.


@pytest.fixture
def fresh_compiler() -> None:
    """Tests must not use up each other's recompilations: past a limit nothing is fused."""
    torch.compiler.reset()


@pytest.fixture
def exact_float32() -> Iterator[None]:
    """No TF32, which rounds the factors of float32 convolutions to 10 bits."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 48, 3, 9, 7), (1, 96, 1, 16, 16)])
def test_norm_silu_is_the_norm_and_then_silu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = WanRMS_norm(shape[1], images=False).to(CUDA)
    nn.init.normal_(norm.gamma, mean=1.0, std=0.3)
    x = torch.randn(shape, device=CUDA).to(memory_format=torch.channels_last_3d)
    slope = torch.randn(shape, device=CUDA)

    def outcome(
        layer: nn.Module, of: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Its value, and the gradients to its input and to gamma."""
        layer = copy.deepcopy(layer).to(of)
        point = x.to(of).requires_grad_()
        y = layer(point)
        y.backward(slope.to(of))
        (gamma,) = layer.parameters()
        return y, point.grad, gamma.grad

    eager = nn.Sequential(norm, nn.SiLU())
    exact = outcome(eager, torch.float64)
    for fused, plain, want in zip(
        outcome(NormSiLU(norm.gamma), dtype), outcome(eager, dtype), exact, strict=True
    ):
        assert fused.shape == want.shape and fused.dtype == dtype
        assert relative_error(fused, want) <= max(2 * relative_error(plain, want), 1e-6)


@pytest.mark.usefixtures("exact_float32", "fresh_compiler")
def test_fused_norms_change_neither_names_nor_video() -> None:
    torch.manual_seed(0)
    plain = AutoencoderKLWan(**TINY_VAE).to(CUDA)
    for name, p in plain.named_parameters():
        if name.endswith("gamma"):
            nn.init.normal_(p, mean=1.0, std=0.3)
    fused = copy.deepcopy(plain)
    fuse_norms(fused)
    assert fused.state_dict().keys() == plain.state_dict().keys()
    video = 2 * torch.rand(1, 3, 9, 32, 32, device=CUDA) - 1
    with torch.no_grad():
        want_latents, latents = (vae.encode(video).latent_dist.mode() for vae in (plain, fused))
        want, got = (vae.decode(want_latents).sample for vae in (plain, fused))
    assert relative_error(latents, want_latents) <= 1e-5
    assert relative_error(got, want) <= 1e-5


@pytest.mark.usefixtures("exact_float32", "fresh_compiler")
def test_a_cuda_graph_gives_the_gradients_of_the_same_work_run_step_by_step() -> None:
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**TINY_VAE)
    fuse_norms(vae)
    model = ClipAutoencoder(vae).to(CUDA)
    video = torch.empty(2, 3, 5, 32, 32, device=CUDA)
    noise = torch.empty(train_vae.latent_shape(video, TINY_VAE), device=CUDA)

    def work(dtype: torch.dtype) -> Callable[[], Metrics]:
        def forward_backward() -> Metrics:
            weights = {name: p.to(dtype) for name, p in model.named_parameters()}
            reconstruction, mean, log_variance = functional_call(
                model, weights, (video.to(dtype), noise)
            )
            loss = autoencoder_loss(reconstruction, video, mean, log_variance)
            loss.backward()
            return {"loss": loss.detach()}

        return forward_backward

    def clear() -> None:
        model.zero_grad(set_to_none=True)

    def draw(seed: int) -> None:
        generator = torch.Generator(CUDA).manual_seed(seed)
        video.uniform_(-1, 1, generator=generator)
        noise.normal_(generator=generator)

    def outcome(run: Callable[[], Metrics]) -> torch.Tensor:
        """Loss and all gradients, one vector."""
        loss = run()["loss"]
        return torch.cat([loss.view(1), *(p.grad.flatten() for p in model.parameters())]).clone()

    def step_by_step(dtype: torch.dtype) -> torch.Tensor:
        clear()
        return outcome(work(dtype))

    wanted = {}
    for seed in (1, 2):
        draw(seed)
        exact = step_by_step(torch.float32)
        wanted[seed] = (exact, relative_error(step_by_step(torch.bfloat16), exact))
    draw(0)
    clear()
    graph = repeatable(work(torch.bfloat16), clear, CUDA)
    for seed in (1, 2, 1):  # inputs change in place, gradients are not added up
        draw(seed)
        exact, own_error = wanted[seed]
        assert relative_error(outcome(graph), exact) <= 2 * own_error < 0.1
    assert relative_error(wanted[1][0], wanted[2][0]) > 0.1, "the inputs make no difference"


@pytest.mark.usefixtures("exact_float32", "fresh_compiler")
def test_the_teachers_gradients_are_those_of_each_batch(tmp_path: Path) -> None:
    """Whatever the batches' shape, and though each one is written over the last."""
    config = TransformerConfig(
        dim=64, ffn_dim=128, num_heads=2, num_layers=2, in_dim=4, out_dim=4, text_dim=8, text_len=5
    )
    torch.manual_seed(0)
    on_cpu = WanModel(config)
    model = copy.deepcopy(on_cpu).to(CUDA)
    for block in model.blocks:
        block.compile(dynamic=False)
    trainer = Trainer(model, tmp_path / "none", betas=(0.9, 0.98), ema=0.999)
    gradients = train_teacher.Gradients(model, trainer, CUDA)

    def flat(model: WanModel) -> torch.Tensor:
        return torch.cat([p.grad.flatten().cpu() for p in model.parameters()])

    def by_hand(batch: list[torch.Tensor], bf16: bool) -> torch.Tensor:
        on_cpu.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            loss = train_teacher.flow_matching_loss(on_cpu, *batch)
        loss.backward()
        return flat(on_cpu)

    for frames in (1, 1, 3, 3):
        noisy, velocity = torch.randn(2, 2, 4, frames, 8, 8).unbind()
        batch = [noisy, torch.rand(2, frames), velocity, torch.randn(2, 5, 8)]
        exact = by_hand(batch, bf16=False)
        loss = gradients(*(x.to(CUDA) for x in batch))["loss"]
        assert loss.isfinite()
        assert relative_error(flat(model), exact) <= 2 * relative_error(by_hand(batch, True), exact)
