"""Train SpriteWan's video autoencoder: AutoencoderKLWan of the Wan 2.2 kind, small widths.

    python -m turbodit.spritewan.train_vae --out runs/vae --minutes 8

With `torchrun --nproc-per-node N -m turbodit.spritewan.train_vae ...` N devices share the
work, each with a batch and clips of its own.

Clips are rendered on the device while training goes on. Most have more sprites than a clip
of the data set, since sprites are what is hard; one in ten is a slow pan over a made-up
picture, so that photographs survive the autoencoder too. The loss is a
Charbonnier distance to the clip and to its edges, plus a small KL term (arXiv:1312.6114)
that keeps the latents near unit scale and smooth enough for a small diffusion model.

Every random draw of a step is seeded by the step's number and clips are numbered, so a run
that was stopped and started again goes on as if it never stopped. Writes `<out>/vae`
(diffusers folder), `<out>/state` and `<out>/log.jsonl`.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanCausalConv3d,
    WanResidualBlock,
    patchify,
    unpatchify,
)
from torch import nn
from torch.func import functional_call

from turbodit.config import PRESETS
from turbodit.spritewan.rank import Rank, join, leave
from turbodit.spritewan.state import Clock, StageLog
from turbodit.spritewan.trainer import (
    Metrics,
    Trainer,
    learning_rate,
    repeatable,
    save_pretrained,
)
from turbodit.spritewan.world import (
    BACKGROUNDS,
    FRAMES,
    HELD_OUT,
    SIZE,
    Scene,
    crowd,
    render,
    scene,
)

GEOMETRY = PRESETS["spritewan"].vae
VAE_CONFIG: dict[str, Any] = {
    "base_dim": 48,
    "decoder_base_dim": 48,
    "z_dim": GEOMETRY.latent_channels,
    "dim_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "attn_scales": [],
    "temperal_downsample": [True, True],
    "is_residual": True,
    # Patches of 4, where Wan 2.2 has 2: the widest layers then run on a quarter of the
    # pixels, and have three times the channels for the same work.
    "in_channels": 48,
    "out_channels": 48,
    "patch_size": 4,
    "scale_factor_temporal": GEOMETRY.temporal_stride,
    "scale_factor_spatial": GEOMETRY.spatial_stride,
    "latents_mean": [0.0] * GEOMETRY.latent_channels,  # measured at the end of training
    "latents_std": [1.0] * GEOMETRY.latent_channels,
}
EDGE_WEIGHT = 0.5
KL_WEIGHT = 1e-4
INITIAL_LOG_VARIANCE = -6.0
WARMUP_STEPS = 100
CLIPS_PER_STEP = 1  # new ones, in place of the oldest
PICTURE_EVERY = 10  # one clip of so many is a pan over a picture
CROWD_EVERY = 4  # of so many, all but one are crowded: nearly all of the error is in sprites
CROWD = 4  # sprites
RENDER_BATCH = 32
EVALUATION_BATCH = 8


@dataclass(frozen=True)
class Options:
    """Settings of one training run."""

    out: Path
    minutes: float = 8.0  # of this run; a later run with the same command goes on
    total_minutes: float = 8.0  # over all runs: the learning rate falls along them
    batch: int = 16  # of each device
    frames: int = 17  # of a training window, 4k + 1
    side: int = 128  # of a training window, in pixels: many small steps learn faster
    lr: float = 2e-3
    pool: int = 1024  # rendered clips that batches are drawn from
    evaluation_clips: int = 128
    save_minutes: float = 2.0
    log_steps: int = 100
    device: str = "cuda"


class ClipAutoencoder(nn.Module):
    """AutoencoderKLWan for training: whole clips at once, and no clamping of the output.

    The library walks through a clip in chunks of one latent frame and hands features of
    the past from chunk to chunk. Only the first chunk is special; the others may as well go
    through together, which computes the same in a quarter of the calls and lets gradients
    flow through the handed-on features.
    """

    def __init__(self, vae: AutoencoderKLWan) -> None:
        super().__init__()
        self.vae = vae

    def encode(self, video: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Video (B,3,T,H,W) in [-1,1] -> mean and log variance, each (B,C,t,h,w)."""
        x = patchify(video, self.vae.config.patch_size)
        x = x.contiguous(memory_format=torch.channels_last_3d)
        cache = _empty_cache(self.vae.encoder)
        first = self.vae.encoder(x[:, :, :1], feat_cache=cache, feat_idx=[0])
        others = self.vae.encoder(x[:, :, 1:], feat_cache=cache, feat_idx=[0])
        moments = self.vae.quant_conv(torch.cat([first, others], dim=2))
        mean, log_variance = moments.float().chunk(2, dim=1)
        return mean, log_variance.clamp(-30.0, 20.0)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B,C,t,h,w) -> video (B,3,T,H,W), not clamped: its gradient never ends."""
        x = self.vae.post_quant_conv(latents)
        x = x.contiguous(memory_format=torch.channels_last_3d)
        cache = _empty_cache(self.vae.decoder)
        first = self.vae.decoder(x[:, :, :1], feat_cache=cache, feat_idx=[0], first_chunk=True)
        others = self.vae.decoder(x[:, :, 1:], feat_cache=cache, feat_idx=[0])
        return unpatchify(torch.cat([first, others], dim=2), self.vae.config.patch_size)

    def forward(
        self, video: torch.Tensor, noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(reconstruction, mean, log variance), the latents drawn with `noise` (B,C,t,h,w)."""
        mean, log_variance = self.encode(video)
        latents = mean + torch.exp(0.5 * log_variance) * noise
        return self.decode(latents.to(video.dtype)), mean, log_variance


class NormSiLU(nn.Module):
    """The VAE's RMS norm and the SiLU after it as one compiled kernel.

    Run one by one, their ten passes over memory take longer than the convolutions between.
    """

    def __init__(self, gamma: nn.Parameter) -> None:
        super().__init__()
        self.gamma = gamma

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.movedim(1, -1)  # no copy where channels already come last in memory
        return _norm_silu(rows.flatten(0, -2), self.gamma.flatten()).view(rows.shape).movedim(-1, 1)


# Two dimensions whatever the layer, so that a few compiled kernels serve them all.
@torch.compile(dynamic=True)
def _norm_silu(x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """SiLU of x (N, C) over its root mean square, times gamma (C)."""
    return F.silu(F.normalize(x, dim=1) * (x.shape[1] ** 0.5 * gamma))


def fuse_norms(vae: AutoencoderKLWan) -> None:
    """Put a `NormSiLU` in place of every norm with a SiLU behind it; names stay the same."""
    for module in vae.modules():
        if isinstance(module, WanResidualBlock):
            module.norm1 = NormSiLU(module.norm1.gamma)
            module.norm2 = NormSiLU(module.norm2.gamma)
            module.nonlinearity = nn.Identity()
    for half in (vae.encoder, vae.decoder):
        half.norm_out = NormSiLU(half.norm_out.gamma)
        half.nonlinearity = nn.Identity()


def _empty_cache(part: nn.Module) -> list[torch.Tensor | str | None]:
    return [None] * sum(isinstance(module, WanCausalConv3d) for module in part.modules())


class ClipPool:
    """The newest training clips, rendered, on the device.

    Clip numbers run on without a gap: after `advance(n)` the pool holds the last `capacity`
    clips before number n, whatever restarts lay between.
    """

    def __init__(self, capacity: int, first_clip: int, device: torch.device) -> None:
        self.clips = torch.empty(
            (capacity, FRAMES, 3, SIZE, SIZE), dtype=torch.uint8, device=device
        )
        self.next_clip = first_clip

    def advance(self, until: int) -> None:
        """Render the clips up to number `until`, each in the place of the oldest one."""
        together = min(RENDER_BATCH, len(self.clips))  # no slot twice
        while self.next_clip < until:
            ids = range(self.next_clip, min(until, self.next_clip + together))
            slots = [clip_id % len(self.clips) for clip_id in ids]
            self.clips[slots] = training_clips(ids, self.clips.device)
            self.next_clip = ids.stop

    def sample(
        self, batch: int, frames: int, side: int, generator: torch.Generator
    ) -> torch.Tensor:
        """Random windows of random clips, (B,3,T,side,side) float32 in [-1,1]."""
        device = self.clips.device

        def windows(length: int, whole: int) -> torch.Tensor:  # (batch, length) indices
            start = torch.randint(
                whole - length + 1, (batch, 1), generator=generator, device=device
            )
            return start + torch.arange(length, device=device)

        clip = torch.randint(len(self.clips), (batch,), generator=generator, device=device)
        t, y, x = windows(frames, FRAMES), windows(side, SIZE), windows(side, SIZE)
        cut = self.clips[
            clip[:, None, None, None], t[:, :, None, None], :, y[:, None, :, None], x[:, None, None]
        ]  # (B,T,side,side,3)
        return to_signed(cut.movedim(-1, 2))


def training_clips(ids: range, device: torch.device) -> torch.Tensor:
    """The clips of these numbers, uint8 (B,T,3,H,W): pictures at every tenth, else scenes."""
    clips = torch.empty((len(ids), FRAMES, 3, SIZE, SIZE), dtype=torch.uint8, device=device)
    is_picture = [clip_id % PICTURE_EVERY == PICTURE_EVERY - 1 for clip_id in ids]
    scenes = [i for i, picture in enumerate(is_picture) if not picture]
    if scenes:
        clips[scenes] = render([training_scene(ids[i]) for i in scenes], device)
    for i, picture in enumerate(is_picture):
        if picture:
            clips[i] = picture_clip(ids[i], device)
    return clips


def training_scene(clip_id: int) -> Scene:
    """A clip of the data set, or the same with more sprites."""
    return crowd(clip_id, CROWD) if clip_id % CROWD_EVERY else scene(clip_id)


def picture_clip(seed: int, device: torch.device) -> torch.Tensor:
    """A slow pan over coloured regions with sharp, curved borders and soft shading.

    Returns uint8 (T,3,H,W).
    """
    generator = torch.Generator(device).manual_seed(seed)
    fastest = 2  # pixels a frame
    side = SIZE + fastest * FRAMES

    def smooth_noise(channels: int, cells: int) -> torch.Tensor:
        coarse = torch.randn(1, channels, cells, cells, generator=generator, device=device)
        return F.interpolate(coarse, size=(side, side), mode="bicubic")[0]

    regions = smooth_noise(channels=8, cells=6).argmax(dim=0)
    colours = torch.rand(8, 3, generator=generator, device=device)
    picture = colours[regions].permute(2, 0, 1)
    for cells, amplitude in ((4, 0.15), (16, 0.06), (64, 0.03)):
        picture = picture + amplitude * smooth_noise(3, cells)
    speed = torch.randint(fastest + 1, (2,), generator=generator, device=device)
    down, right = speed.tolist()
    frames = [
        picture[:, t * down : t * down + SIZE, t * right : t * right + SIZE] for t in range(FRAMES)
    ]
    return (255 * torch.stack(frames).clamp(0, 1)).round().byte()


def to_signed(clips: torch.Tensor) -> torch.Tensor:
    """uint8 (B,T,3,H,W) -> float32 (B,3,T,H,W) in [-1,1]."""
    return clips.transpose(1, 2).float() / 127.5 - 1


def to_bytes(video: torch.Tensor) -> torch.Tensor:
    """Float (B,3,T,H,W) in [-1,1] -> uint8 (B,T,3,H,W)."""
    return ((video.float() + 1) * 127.5).clamp(0, 255).round().byte().transpose(1, 2)


def charbonnier(error: torch.Tensor) -> torch.Tensor:
    """Mean of sqrt(error^2 + eps^2): squared for small errors, absolute for large ones."""
    return (error.square() + 0.05**2).sqrt().mean()


def autoencoder_loss(
    reconstruction: torch.Tensor,
    video: torch.Tensor,
    mean: torch.Tensor,
    log_variance: torch.Tensor,
) -> torch.Tensor:
    """Scalar: distance of pixels, of differences between neighbours, and KL to N(0, 1)."""
    error = reconstruction.float() - video
    edges = charbonnier(error.diff(dim=-1)) + charbonnier(error.diff(dim=-2))
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return charbonnier(error) + EDGE_WEIGHT * edges + KL_WEIGHT * kl


def train(options: Options, config: dict[str, Any] = VAE_CONFIG) -> None:
    """Train for `options.minutes`, then evaluate and export.

    Raises:
        ValueError: the window is not 4k + 1 frames of a clip.
        FloatingPointError: the gradient is no longer finite.
    """
    if options.frames % 4 != 1 or not 5 <= options.frames <= FRAMES:
        raise ValueError(f"frames must be 5, 9, ... {FRAMES}, got {options.frames}")
    clock = Clock(options.minutes)
    rank, device = join(options.device)
    log = StageLog(options.out / "log.jsonl") if rank.is_first else None
    # Masters stay float32; the networks compute in what inference will use.
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**config)
    # Start with little noise in the latents: at unit scale it would drown what they say.
    nn.init.constant_(vae.quant_conv.bias[config["z_dim"] :], INITIAL_LOG_VARIANCE)
    if device.type == "cuda":
        fuse_norms(vae)
    model = ClipAutoencoder(vae).to(device)
    trainer = Trainer(model, options.out / "state", betas=(0.9, 0.99), ema=0.999)
    seconds_before = trainer.info.get("seconds", 0.0)
    if log:
        settings = {name: str(value) for name, value in asdict(options).items()}
        log.write(event="start", step=trainer.step, devices=rank.count, options=settings)
    newest = _clips_wanted(trainer.step, options, rank)
    pool = ClipPool(options.pool, newest - options.pool, device)
    pool.advance(newest)
    if log:
        log.write(event="rendered", clips=options.pool, seconds=clock.seconds)
    window = (options.batch, 3, options.frames, options.side, options.side)
    video = torch.empty(window, device=device)
    noise = torch.empty(latent_shape(video, config), device=device)

    def forward_backward() -> Metrics:
        weights = {name: p.to(dtype) for name, p in model.named_parameters()}
        reconstruction, mean, log_variance = functional_call(
            model, weights, (video.to(dtype), noise)
        )
        loss = autoencoder_loss(reconstruction, video, mean, log_variance)
        loss.backward()
        error = reconstruction.detach().float() - video
        return {
            "loss": loss.detach(),
            "psnr": 10 * torch.log10(4 / error.square().mean()),
            "latent_scale": mean.detach().std(),
            "posterior_scale": (0.5 * log_variance.detach()).exp().mean(),
        }

    gradients = repeatable(forward_backward, trainer.clear_gradients, device)
    now = last_save = last_log = rank.agree(clock.seconds, device)
    last_step = trainer.step
    while now < 60 * options.minutes:
        step = trainer.step
        generator = torch.Generator(device).manual_seed(step * rank.count + rank.index)
        pool.advance(_clips_wanted(step, options, rank))
        video.copy_(pool.sample(options.batch, options.frames, options.side, generator))
        noise.normal_(generator=generator)
        share = (seconds_before + now) / (60 * options.total_minutes)
        lr = learning_rate(options.lr, step, WARMUP_STEPS, share)
        metrics = gradients()
        norm = trainer.apply_gradients(lr)
        if step % options.log_steps:
            continue
        if not norm.isfinite():  # of the mean gradient: all processes see it and stop
            raise FloatingPointError(f"the gradient's norm is {norm.item()} at step {step}")
        now = rank.agree(clock.seconds, device)
        if log:
            log.write(
                step=step,
                **metrics,
                gradient_norm=norm,
                lr=lr,
                clips_per_second=(step - last_step) * options.batch / (now - last_log),
                seconds=now,
            )
            last_log, last_step = now, step
            if now - last_save > 60 * options.save_minutes:
                trainer.save(seconds=seconds_before + now)
                last_save = now
    if log:
        trainer.save(seconds=seconds_before + now)
        _export(trainer.averaged().vae, options, config, log)
        log.write(event="stop", step=trainer.step, seconds=clock.seconds)
    leave()


def _export(
    trained: AutoencoderKLWan, options: Options, config: dict[str, Any], log: StageLog
) -> None:
    """Write `<out>/vae` with `trained`'s weights, and to the log how well it does."""
    device = next(trained.parameters()).device
    vae = AutoencoderKLWan(**config).to(device).eval().requires_grad_(False)
    vae.load_state_dict(trained.state_dict())
    set_latent_statistics(vae, options.evaluation_clips, device)
    save_pretrained(copy.deepcopy(vae).bfloat16(), options.out / "vae")
    for dtype in (torch.float32, torch.bfloat16):
        results = evaluate(copy.deepcopy(vae).to(dtype), options.evaluation_clips, device)
        log.write(event="evaluation", dtype=str(dtype), **results)


def _clips_wanted(step: int, options: Options, rank: Rank) -> int:
    """One past the newest clip's number at `step`: new ones come in whole batches.

    Each process counts through a part of the training clips that is its own.
    """
    first = HELD_OUT // rank.count * rank.index
    return first + step * CLIPS_PER_STEP // RENDER_BATCH * RENDER_BATCH + options.pool


def latent_shape(video: torch.Tensor, config: dict[str, Any]) -> tuple[int, int, int, int, int]:
    """(B,C,t,h,w) of the latents of a video (B,3,T,H,W)."""
    batch, _, frames, height, width = video.shape
    stride_t, stride = config["scale_factor_temporal"], config["scale_factor_spatial"]
    t = (frames - 1) // stride_t + 1
    return batch, config["z_dim"], t, height // stride, width // stride


@torch.no_grad()
def set_latent_statistics(vae: AutoencoderKLWan, clips: int, device: torch.device) -> None:
    """Write mean and standard deviation of each latent channel into the configuration."""
    latents = []
    for start in range(0, clips, EVALUATION_BATCH):
        ids = range(start, min(clips, start + EVALUATION_BATCH))
        video = to_signed(render([scene(i) for i in ids], device))
        latents.append(vae.encode(video).latent_dist.mode().float())
    std, mean = torch.std_mean(torch.cat(latents), dim=(0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())


@torch.no_grad()
def evaluate(vae: AutoencoderKLWan, clips: int, device: torch.device) -> dict[str, Any]:
    """PSNR in dB of held-out clips, encoded and decoded, on bytes: over all, by background."""
    psnr, first_frame = [], []
    by_background = defaultdict(list)
    for start in range(HELD_OUT, HELD_OUT + clips, EVALUATION_BATCH):
        scenes = [scene(i) for i in range(start, min(HELD_OUT + clips, start + EVALUATION_BATCH))]
        video = render(scenes, device)
        latents = vae.encode(to_signed(video).to(vae.dtype)).latent_dist.mode()
        error = to_bytes(vae.decode(latents).sample).float() - video.float()
        frames = error.square().mean(dim=(2, 3, 4))  # (B,T)
        psnr += decibels(frames.mean(dim=1))
        first_frame += decibels(frames[:, 0])
        for one, value in zip(scenes, psnr[-len(scenes) :], strict=True):
            by_background[BACKGROUNDS[one.background]].append(value)
    return {
        "clips": clips,
        "psnr_mean": sum(psnr) / clips,
        "psnr_min": min(psnr),
        "psnr_first_frame": sum(first_frame) / clips,
        "psnr_by_background": {
            name: round(sum(values) / len(values), 2)
            for name, values in sorted(by_background.items())
        },
    }


def decibels(squared_error: torch.Tensor) -> list[float]:
    """PSNR of mean squared errors of bytes; the floor keeps exact copies finite (88 dB)."""
    return (10 * torch.log10(255**2 / squared_error.clamp(min=1e-4))).tolist()


if __name__ == "__main__":
    train(tyro.cli(Options))
