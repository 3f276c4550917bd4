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
MOTION_FLOOR = 1e-4  # energy under which a frame counts as still
CHANGE_GAIN = 5.0  # or the little that changes over time drowns in what stays
_WEIGHTS, _CONFIG = "model.safetensors", "config.json"
_LABELS = {"objects": OBJECTS, "motions": MOTIONS, "backgrounds": BACKGROUNDS}


@dataclass(frozen=True)
class JudgeConfig:
    """Shape of the judge: it sees `frames` frames of `size` x `size` pixels.

    Attributes:
        widths: channels of the residual stages, at strides of 2, 4, 8 and 8 pixels.
        heads, head_width: of the look-outs that gather each frame's features.
        time_width: channels of the stages over time.
        features: width of the features.
    """

    frames: int = 17
    size: int = 128
    widths: tuple[int, int, int, int] = (32, 64, 128, 128)
    heads: int = 4
    head_width: int = 32
    time_width: int = 192
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
    """Each frame through a 2D residual trunk, gathered into one vector; then 1D over time."""

    def __init__(self, config: JudgeConfig = JudgeConfig()) -> None:
        super().__init__()
        self.config = config
        a, b, c, d = config.widths
        self.trunk = nn.Sequential(
            nn.Conv2d(6, a, 5, stride=2, padding=2, bias=False),
            _norm(a),
            nn.ReLU(),
            ResidualBlock(a, a),
            ResidualBlock(a, b, stride=2),
            ResidualBlock(b, c, stride=2),
            ResidualBlock(c, d),
        )
        self.gather = SpatialAttention(d, config.heads, config.head_width)
        self.to_frame = nn.Linear(2 * self.gather.width, config.time_width)
        self.over_time = nn.Sequential(*(TimeBlock(config.time_width, 2**i) for i in range(3)))
        self.to_features = nn.Sequential(
            nn.Linear(2 * config.time_width, config.features),
            nn.LayerNorm(config.features),
            nn.GELU(),
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
        # What moves stands out from the clip's mean; backgrounds and what stays cancel.
        moving = frames - frames.mean(dim=1, keepdim=True)
        x = torch.cat([frames, moving], dim=2).flatten(0, 1)
        x = self.trunk(x.contiguous(memory_format=torch.channels_last))
        # The rest is small, and lives on differences that bfloat16 would round away.
        with torch.autocast(frames.device.type, enabled=False):
            x = self.gather(x.float(), _where_it_moves(moving, x.shape[-2:]))
            x = x.unflatten(0, frames.shape[:2])
            change = CHANGE_GAIN * (x - x.mean(dim=1, keepdim=True))
            x = self.to_frame(torch.cat([x, change], dim=-1))
            x = self.over_time(x.transpose(1, 2))
            features = self.to_features(torch.cat([x.mean(dim=-1), x.amax(dim=-1)], dim=-1))
            return Verdict(
                self.object_head(features),
                self.motion_head(features),
                self.background_head(features),
                features,
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


def _where_it_moves(moving: Tensor, size: Sequence[int]) -> Tensor:
    """Differences (B, t, 3, H, W) to the clip's mean -> weights (B t, 1, *size) of the pixels.

    They sum to 1 in each frame, and to nearly 0 where nothing moves.
    """
    energy = moving.square().mean(dim=2).flatten(0, 1)[:, None]
    energy = F.adaptive_avg_pool2d(energy, (size[0], size[1])).square()
    return energy / (energy.sum(dim=(2, 3), keepdim=True) + MOTION_FLOOR)


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


class SpatialAttention(nn.Module):
    """Where to look, and what is there: (N, C, h, w) -> (N, width).

    Each head averages its own features over the pixels, and the pixels' coordinates and their
    squares, that is place and extent. One head's weights are given, those of the others are
    learned (spatial softmax, arXiv:1504.00702). Mean and maximum over all pixels stand for
    the background.
    """

    def __init__(self, channels: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.where = nn.Conv2d(channels, heads - 1, 1)
        self.what = nn.Conv2d(channels, heads * head_width, 1)
        self.width = heads * (head_width + 4) + 2 * channels

    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        """`given` (N, 1, h, w): weights of the first head, at least 0, summing to at most 1."""
        height, width = x.shape[-2:]
        learned = self.where(x).flatten(2).softmax(dim=-1)
        weights = torch.cat([given.flatten(2), learned], dim=1)  # (N, heads, h w)
        values = self.what(x).flatten(2).unflatten(1, (self.heads, -1))
        seen = torch.einsum("nhp,nhcp->nhc", weights, values)
        line_y = torch.linspace(-1, 1, height, device=x.device)
        line_x = torch.linspace(-1, 1, width, device=x.device)
        at = torch.stack(torch.meshgrid(line_y, line_x, indexing="ij")).flatten(1)
        place = torch.einsum("nhp,cp->nhc", weights, torch.cat([at, at.square()]))
        parts = (seen.flatten(1), place.flatten(1), x.mean(dim=(2, 3)), x.amax(dim=(2, 3)))
        return torch.cat(parts, dim=-1)


class TimeBlock(nn.Module):
    """A convolution over three frames, `dilation` apart, around the identity: (B, C, t)."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, width)
        self.conv = nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(F.gelu(self.norm(x)))


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
