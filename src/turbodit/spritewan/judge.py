"""The judge: a small network that says which objects, motion and background a clip shows.

Trained on ground-truth clips of SpriteWorld, it measures how well a generated clip follows
its prompt; its features serve a Fréchet distance.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from turbodit.spritewan.world import BACKGROUNDS, MOTIONS, OBJECTS, Scene

JUDGE = Path(__file__).parents[1] / "assets" / "spritewan" / "judge"
MIN_FRAMES = 9
_WEIGHTS, _CONFIG = "model.safetensors", "config.json"
_LABELS = {"objects": OBJECTS, "motions": MOTIONS, "backgrounds": BACKGROUNDS}


@dataclass(frozen=True)
class JudgeConfig:
    """Shape of the judge: it sees `frames` frames of `size` x `size` pixels."""

    frames: int = 17
    size: int = 128
    widths: tuple[int, int, int, int] = (32, 64, 128, 160)
    features: int = 256


@dataclass(frozen=True)
class Verdict:
    """What the judge says of B clips, float32.

    Attributes:
        object_logits: (B, len(OBJECTS)), of a softmax; a clip of two sprites has two peaks.
        motion_logits: (B, len(MOTIONS)).
        background_logits: (B, len(BACKGROUNDS)).
        features: (B, 256), the layer before the logits.
    """

    object_logits: Tensor
    motion_logits: Tensor
    background_logits: Tensor
    features: Tensor

    @classmethod
    def concatenate(cls, parts: Sequence[Verdict]) -> Verdict:
        """The verdicts on several batches as one."""
        return cls(*(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(cls)))


class Judge(nn.Module):
    """Frames through a 2D residual trunk, which from a stride of 16 pixels on mixes time too."""

    def __init__(self, config: JudgeConfig = JudgeConfig()) -> None:
        super().__init__()
        self.config = config
        a, b, c, d = config.widths
        self.stem = nn.Sequential(
            nn.Conv2d(6, a, 5, stride=2, padding=2, bias=False), _norm(a), nn.ReLU()
        )
        self.frame_blocks = nn.Sequential(
            ResidualBlock(a, a), ResidualBlock(a, b, stride=2), ResidualBlock(b, c, stride=2)
        )
        self.time_blocks = nn.ModuleList(
            (TimeBlock(c, stride=1), TimeBlock(c, stride=2), TimeBlock(d, stride=2))
        )
        self.space_blocks = nn.ModuleList(
            (ResidualBlock(c, c), ResidualBlock(c, d, stride=2), nn.Identity())
        )
        self.to_features = nn.Sequential(
            nn.Linear(2 * d, config.features), nn.LayerNorm(config.features), nn.GELU()
        )
        self.object_head = nn.Linear(config.features, len(OBJECTS))
        self.motion_head = nn.Linear(config.features, len(MOTIONS))
        self.background_head = nn.Linear(config.features, len(BACKGROUNDS))

    def prepare(self, video: Tensor) -> Tensor:
        """uint8 (B, T, 3, H, W) -> float32 (B, t, 3, size, size) in [-1, 1], t <= frames.

        Frames are taken at equal distances from the first to the last.

        Raises:
            ValueError: wrong dtype or shape, or fewer than 9 frames.
        """
        if video.dtype != torch.uint8 or video.ndim != 5 or video.shape[2] != 3:
            raise ValueError(
                f"got {video.dtype} {tuple(video.shape)}, expected uint8 (B, T, 3, H, W)"
            )
        count = video.shape[1]
        if count < MIN_FRAMES:
            raise ValueError(f"the judge needs at least {MIN_FRAMES} frames, got {count}")
        kept = torch.linspace(0, count - 1, min(count, self.config.frames)).round().long()
        frames = video[:, kept.to(video.device)]
        small = F.interpolate(
            frames.flatten(0, 1).float(), size=(self.config.size, self.config.size), mode="area"
        )
        return (small / 127.5 - 1).unflatten(0, frames.shape[:2])

    def forward(self, frames: Tensor) -> Verdict:
        """A verdict on prepared frames (B, t, 3, size, size)."""
        batch = frames.shape[0]
        # What moves stands out from the clip's mean; backgrounds and what stays cancel.
        moving = frames - frames.mean(dim=1, keepdim=True)
        x = (
            torch.cat([frames, moving], dim=2)
            .flatten(0, 1)
            .contiguous(memory_format=torch.channels_last)
        )
        x = self.frame_blocks(self.stem(x))
        for mix_time, mix_space in zip(self.time_blocks, self.space_blocks, strict=True):
            x = mix_space(mix_time(x, batch))
        x = x.unflatten(0, (batch, -1))
        pooled = torch.cat([x.mean(dim=(1, 3, 4)), x.amax(dim=(1, 3, 4))], dim=-1)
        features = self.to_features(pooled)
        return Verdict(
            self.object_head(features).float(),
            self.motion_head(features).float(),
            self.background_head(features).float(),
            features.float(),
        )

    @torch.no_grad()
    def predict(self, video: Tensor, batch: int = 16) -> Verdict:
        """A verdict on clips: uint8 (B, T >= 9, 3, H, W) on any device, `batch` at a time.

        Raises:
            ValueError: wrong dtype or shape, or fewer than 9 frames.
        """
        device = self.object_head.weight.device
        parts = [self(self.prepare(clips.to(device))) for clips in video.split(batch)]
        return Verdict.concatenate(parts)


def _norm(width: int) -> nn.GroupNorm:
    """Groups of eight channels; unlike batch norm, the same in training and judgement."""
    return nn.GroupNorm(width // 8, width)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a (projected) identity: (N, C, h, w)."""

    def __init__(self, width_in: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride=stride, padding=1, bias=False)
        self.norm1 = _norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = _norm(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or width_in != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(width_in, width, 1, stride=stride, bias=False), _norm(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class TimeBlock(nn.Module):
    """A convolution over three neighbouring frames around the identity.

    (B t, C, h, w) -> (B t', C, h, w), t' = ceil(t / stride).
    """

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(width, width, (3, 1), stride=(stride, 1), padding=(1, 0), bias=False)
        self.norm = _norm(width)

    def forward(self, x: Tensor, batch: int) -> Tensor:
        height, width = x.shape[-2:]
        # Time as the image's rows and all pixels as its columns: a 2D convolution again.
        clip = x.unflatten(0, (batch, -1)).transpose(1, 2).flatten(3)
        mixed = F.relu(clip[:, :, :: self.stride] + self.norm(self.conv(clip)))
        return mixed.transpose(1, 2).flatten(0, 1).unflatten(-1, (height, width))


def score(verdict: Verdict, scenes: Sequence[Scene]) -> dict[str, float]:
    """Share of clips whose verdict agrees with `scenes`, for object, motion and background.

    A clip of two sprites counts when the two likeliest objects are the two named.

    Raises:
        ValueError: there are not as many scenes as verdicts.
    """
    if len(scenes) != len(verdict.object_logits):
        raise ValueError(f"got {len(verdict.object_logits)} verdicts for {len(scenes)} scenes")
    likeliest = verdict.object_logits.topk(2, dim=-1).indices.tolist()
    motions = verdict.motion_logits.argmax(dim=-1).tolist()
    backgrounds = verdict.background_logits.argmax(dim=-1).tolist()
    hits = {
        "object": [
            set(top[: len(s.objects)]) == set(s.objects)
            for top, s in zip(likeliest, scenes, strict=True)
        ],
        "motion": [m == s.motion for m, s in zip(motions, scenes, strict=True)],
        "background": [b == s.background for b, s in zip(backgrounds, scenes, strict=True)],
    }
    return {name: sum(hit) / len(hit) for name, hit in hits.items()}


def save_judge(judge: Judge, folder: Path) -> None:
    """Write `config.json` and `model.safetensors` (bfloat16) to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: w.to(torch.bfloat16).cpu().contiguous() for name, w in judge.state_dict().items()
    }
    config = asdict(judge.config) | {name: list(labels) for name, labels in _LABELS.items()}
    save_file(weights, folder / f"{_WEIGHTS}.partial")
    (folder / f"{_CONFIG}.partial").write_text(json.dumps(config, indent=1) + "\n")
    for name in (_WEIGHTS, _CONFIG):
        os.replace(folder / f"{name}.partial", folder / name)


def load_judge(folder: Path | None = None, device: str | torch.device = "cpu") -> Judge:
    """The judge in `folder` (default: the embedded one), in float32 and ready to predict.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: it was trained for other labels than SpriteWorld's.
        RuntimeError: the weights do not fit the config.
    """
    folder = JUDGE if folder is None else folder
    for name in (_CONFIG, _WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"no judge in {folder}: {name} is missing")
    config = json.loads((folder / _CONFIG).read_text())
    for name, labels in _LABELS.items():
        if config.pop(name) != list(labels):
            raise ValueError(
                f"the judge in {folder} was trained for other {name} than SpriteWorld's"
            )
    judge = Judge(JudgeConfig(**config | {"widths": tuple(config["widths"])}))
    judge.load_state_dict(load_file(folder / _WEIGHTS))
    return judge.to(device).eval().requires_grad_(False)
