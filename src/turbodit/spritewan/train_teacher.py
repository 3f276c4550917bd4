"""Train the SpriteWan teacher: flow matching on text-to-video and image-to-video at once.

    python -m turbodit.spritewan.train_teacher --out runs/teacher \
        --vae runs/vae/vae --text-encoder runs/text/text_encoder --tokenizer runs/text/tokenizer

The loss is rectified flow's (arXiv:2209.03003): ||v - (noise - x0)||^2 at
x_t = (1-t) x0 + t noise. The TI2V form of Wan 2.2 makes one model of both tasks: in a share
of the samples the first latent frame stays clean, with time 0 there and no loss on it.
Training begins with the first few latent frames of each clip: what things look like can be
learned there in a third of the time, and many more clips are seen.

Every random draw of a step is seeded by the step's number, and the clips it may see are
numbered, so a run that was stopped and started again goes on as if it never stopped. With
`torchrun --nproc-per-node N -m turbodit.spritewan.train_teacher ...` N devices share the
work, each with a batch and clips of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
from torch.utils.data import DataLoader, Dataset

from turbodit.checkpoints import save_transformer
from turbodit.config import PRESETS
from turbodit.model.wan import WanModel
from turbodit.noise_schedule import shift_time
from turbodit.spritewan.rank import Rank, join, leave
from turbodit.spritewan.state import Clock, StageLog
from turbodit.spritewan.train_vae import to_signed
from turbodit.spritewan.trainer import Metrics, Trainer, learning_rate, repeatable
from turbodit.spritewan.world import FRAMES, HELD_OUT, SIZE, Scene, render, scene
from turbodit.text_encoder import TextEncoder
from turbodit.vae import VideoVAE

CONFIG = PRESETS["spritewan"]
ENCODE_BATCH = 64  # clips rendered and encoded at once
WARMUP_STEPS = 300


@dataclass(frozen=True)
class Options:
    """Settings of one training run."""

    out: Path
    vae: Path
    text_encoder: Path
    tokenizer: Path
    minutes: float = 8.0  # of this run; a later run with the same command goes on
    total_minutes: float = 8.0  # over all runs: the learning rate falls along them
    batch: int = 128  # of each device
    short_share: float = 0.4  # of the time, at first, goes to clips of a few latent frames
    short_frames: int = 3
    short_batch: int = 256  # of each device
    lr: float = 4e-3
    caption_dropout: float = 0.1
    image_share: float = 0.3  # samples trained as image-to-video
    time_shift: float = 3.0
    ema_decay: float = 0.999
    first_clips: int = 4096  # encoded before the first step, by each device
    max_clips: int = 131_072  # kept; older ones make room
    clips_per_step: int = 1  # new ones, so that no clip is seen too often
    save_minutes: float = 3.0
    log_steps: int = 50
    seed: int = 0
    workers: int = 8
    device: str = "cuda"
    compile: bool = True


@dataclass(frozen=True)
class _Scenes(Dataset[Scene]):
    """This process's training clips, from number `start` on: every `count`-th of all."""

    start: int
    rank: Rank

    def __len__(self) -> int:
        return HELD_OUT // self.rank.count - self.start

    def __getitem__(self, index: int) -> Scene:
        return scene((self.start + index) * self.rank.count + self.rank.index)


class LatentBuffer:
    """The newest clips as latents and text embeddings, on the device.

    Clip numbers run on without a gap: after `grow(n)` the buffer holds the last `capacity`
    clips before number n, whatever restarts lay between.
    """

    def __init__(
        self,
        options: Options,
        rank: Rank,
        device: torch.device,
        vae: VideoVAE,
        text: TextEncoder,
    ) -> None:
        self.vae, self.text, self.rank, self.device = vae, text, rank, device
        self.workers = options.workers
        capacity = options.max_clips
        dit = CONFIG.transformer
        self.latents = torch.empty(
            (capacity, *CONFIG.latent_shape(FRAMES, SIZE, SIZE)),
            dtype=torch.bfloat16,
            device=self.device,
        )
        self.context = torch.empty(
            (capacity, dit.text_len, dit.text_dim), dtype=torch.bfloat16, device=self.device
        )
        self.next_clip = 0
        self.size = 0

    def fill(self, until: int) -> None:
        """Start: the last `capacity` clips before number `until` (a multiple of the batch)."""
        self.next_clip = max(0, until - len(self.latents))
        loader = DataLoader(
            _Scenes(self.next_clip, self.rank),
            batch_size=ENCODE_BATCH,
            num_workers=self.workers,
            collate_fn=list,
            prefetch_factor=8 if self.workers else None,
        )
        self.scenes: Iterator[list[Scene]] = iter(loader)
        self.grow(until)

    @torch.no_grad()
    def grow(self, until: int) -> None:
        """Encode the clips up to number `until`, each in the place of the oldest one."""
        while self.next_clip < until:
            scenes = next(self.scenes)
            slot = self.next_clip % len(self.latents)
            rows = slice(slot, slot + ENCODE_BATCH)
            video = render(scenes, self.device)
            self.latents[rows] = self.vae.encode(to_signed(video)).bfloat16()
            self.context[rows] = self.text.encode([s.caption for s in scenes]).bfloat16()
            self.next_clip += ENCODE_BATCH
            self.size = min(self.size + ENCODE_BATCH, len(self.latents))

    def sample(self, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """`count` random clips: latents (B,C,T,H,W) float32 and context (B,Lt,D) float32."""
        age = torch.randint(self.size, (count,), generator=generator, device=self.device)
        rows = (self.next_clip - 1 - age) % len(self.latents)
        return self.latents[rows].float(), self.context[rows].float()


def add_noise(
    latents: torch.Tensor, options: Options, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents (B,C,T,H,W) -> noisy latents, their times (B,T), 0 for clean frames, velocity."""
    batch, _, frames, _, _ = latents.shape
    device = latents.device
    noise = torch.randn(latents.shape, generator=generator, device=device)
    # Stratified times: the same spread in every batch makes the gradient quieter.
    offsets = torch.rand(batch, generator=generator, device=device)
    t = shift_time((torch.arange(batch, device=device) + offsets) / batch, options.time_shift)
    t = t[:, None].repeat(1, frames)
    keep_first = torch.rand(batch, generator=generator, device=device) < options.image_share
    t[:, 0].masked_fill_(keep_first, 0.0)
    mix = t[:, None, :, None, None]
    return (1 - mix) * latents + mix * noise, t, noise - latents


def flow_matching_loss(
    model: torch.nn.Module,
    noisy: torch.Tensor,
    t: torch.Tensor,
    velocity: torch.Tensor,
    context: torch.Tensor,
) -> torch.Tensor:
    """Mean squared error of the velocity (B,C,T,H,W) over the frames with t > 0; scalar."""
    error = (model(noisy, t, context).float() - velocity).square().mean(dim=(1, 3, 4))
    is_noisy = t > 0
    return (error * is_noisy).sum() / is_noisy.sum()


class Gradients:
    """Gradients of the loss for batches of one shape, which a GPU replays as one graph."""

    def __init__(self, model: WanModel, trainer: Trainer[WanModel], device: torch.device) -> None:
        self.model, self.trainer, self.device = model, trainer, device
        self.inputs: tuple[torch.Tensor, ...] = ()
        self.run: Callable[[], Metrics]

    def __call__(self, *inputs: torch.Tensor) -> Metrics:
        """Leave the gradients at these inputs of `flow_matching_loss` behind."""
        if [x.shape for x in inputs] == [x.shape for x in self.inputs]:
            for mine, given in zip(self.inputs, inputs, strict=True):
                mine.copy_(given)
        else:
            self.inputs = inputs
            self.run = repeatable(self._work, self.trainer.clear_gradients, self.device)
        return self.run()

    def _work(self) -> Metrics:
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            loss = flow_matching_loss(self.model, *self.inputs)
        loss.backward()
        return {"loss": loss.detach()}


def train(options: Options) -> None:
    """Train until the minutes are over, then export `<out>/transformer` (bf16)."""
    clock = Clock(options.minutes)
    rank, device = join(options.device)
    log = StageLog(options.out / "log.jsonl") if rank.is_first else None
    model = WanModel(CONFIG.transformer)
    model.init_weights(torch.Generator().manual_seed(options.seed))
    trainer = Trainer(
        model.to(device), options.out / "state", betas=(0.9, 0.98), ema=options.ema_decay
    )
    seconds_before = trainer.info.get("seconds", 0.0)
    if log:
        settings = {name: str(value) for name, value in asdict(options).items()}
        log.write(event="start", step=trainer.step, devices=rank.count, options=settings)
    buffer = LatentBuffer(options, rank, device, *_encoders(options, device))
    dropped = buffer.text.encode([""]).float()
    buffer.fill(until=_clips_wanted(trainer.step, options))
    if log:
        log.write(event="encoded", clips=buffer.size, seconds=clock.seconds)
    if options.compile:
        for block in model.blocks:
            block.compile(dynamic=False)  # kernels of their own for short clips and for whole ones
    gradients = Gradients(model, trainer, device)
    now = last_save = rank.agree(clock.seconds, device)
    while now < 60 * options.minutes:
        step = trainer.step
        buffer.grow(until=_clips_wanted(step, options))
        seed = (options.seed << 40) + step * rank.count + rank.index
        generator = torch.Generator(device).manual_seed(seed)
        share = (seconds_before + now) / (60 * options.total_minutes)
        batch, frames = options.batch, None
        if share < options.short_share:
            batch, frames = options.short_batch, options.short_frames
        latents, context = buffer.sample(batch, generator)
        latents = latents[:, :, :frames]
        drop = torch.rand(batch, generator=generator, device=device)
        context = torch.where((drop < options.caption_dropout)[:, None, None], dropped, context)
        metrics = gradients(*add_noise(latents, options, generator), context)
        lr = learning_rate(options.lr, step, WARMUP_STEPS, share)
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
                clips=buffer.next_clip,
                seconds=now,
            )
            if now - last_save > 60 * options.save_minutes:
                trainer.save(seconds=seconds_before + now)
                last_save = now
    if log:
        trainer.save(seconds=seconds_before + now)
        export(trainer.averaged(), options.out / "transformer")
        log.write(event="stop", step=trainer.step, seconds=clock.seconds)
    leave()


def export(model: WanModel, folder: Path) -> None:
    """Write `model` as a diffusers folder: bf16, but for what Wan keeps in float32."""
    for name, p in model.named_parameters():
        if not model.keep_float32(name):
            p.data = p.data.bfloat16()
    save_transformer(model, folder, max_shard_size="15MB")


def _encoders(options: Options, device: torch.device) -> tuple[VideoVAE, TextEncoder]:
    vae = VideoVAE.from_pretrained(options.vae, dtype=torch.bfloat16, device=device)
    text = TextEncoder.from_pretrained(
        options.text_encoder, options.tokenizer, CONFIG.transformer.text_len, device=device
    )
    return vae, text


def _clips_wanted(step: int, options: Options) -> int:
    """Number of clips that have been made by `step`, a multiple of the encoder's batch."""
    clips = options.first_clips + step * options.clips_per_step
    return clips // ENCODE_BATCH * ENCODE_BATCH


if __name__ == "__main__":
    train(tyro.cli(Options))
