"""SpriteWorld as training data; tiny networks stand in for the embedded model's encoders."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from turbodit.checkpoints import find_model
from turbodit.spritewan import shards
from turbodit.spritewan.shards import write_clips
from turbodit.spritewan.world import HELD_OUT, render, scene
from turbodit.training.data import DatasetInfo, LatentDataset
from turbodit.training.data.shards import sample_key

MODEL = find_model("spritewan-teacher").config()


class Encoders:
    """Latents are means of pixels, embeddings the number of letters; `encoded` is what was."""

    def __init__(self) -> None:
        self.encoded: list[str] = []
        self.vae = SimpleNamespace(model=nn.Linear(2, 2), encode=self._latents)
        self.text = SimpleNamespace(encode=self._context)

    def _latents(self, video: torch.Tensor) -> torch.Tensor:
        assert video.shape[1:] == (3, 33, 256, 256)
        assert video.min() >= -1 and video.max() <= 1 and video.min() < -0.5
        means = F.adaptive_avg_pool3d(video, (9, 16, 16))
        return means.repeat(1, 11, 1, 1, 1)[:, :32]

    def _context(self, captions: list[str]) -> torch.Tensor:
        self.encoded += captions
        lengths = torch.tensor([len(caption) for caption in captions])
        return lengths[:, None, None].expand(-1, 64, 128).float()


@pytest.fixture
def encoders(monkeypatch) -> Encoders:
    torch.manual_seed(0)
    found = Encoders()
    loader = SimpleNamespace(from_pretrained=lambda name, device: found)
    monkeypatch.setattr(shards, "Encoders", loader)
    monkeypatch.setattr(shards, "SHARD_SIZE", 2)
    monkeypatch.setattr(shards, "BATCH", {"cpu": 1})
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_clips_are_samples_of_their_numbers(encoders, tmp_path):
    write_clips(tmp_path, 3, "cpu")
    data = LatentDataset(tmp_path, MODEL, batch=3)
    assert data.latent_shape == (32, 9, 16, 16)
    batch = next(iter(data))
    assert sorted(batch.keys) == [sample_key(number) for number in range(3)]
    for row, key in enumerate(batch.keys):
        one = scene(int(key))
        assert batch.prompts[row] == one.caption
        assert (batch.context[row] == len(one.caption)).all()
        video = render([one], torch.device("cpu")).float().transpose(1, 2) / 127.5 - 1
        expected = encoders._latents(video)[0].bfloat16().float()
        torch.testing.assert_close(batch.latents[row], expected, rtol=2**-7, atol=1e-2)


def test_the_folder_says_what_it_holds(encoders, tmp_path):
    write_clips(tmp_path, 3, "cpu")
    info = DatasetInfo.load(tmp_path)
    assert (info.model, info.count, info.shards) == ("spritewan", 3, 2)
    with pytest.raises(ValueError, match="count is 3, asked for 4"):
        write_clips(tmp_path, 4, "cpu")


def test_what_is_there_is_not_made_again(encoders, tmp_path):
    write_clips(tmp_path, 3, "cpu")
    whole = files(tmp_path)
    encoders.encoded.clear()
    write_clips(tmp_path, 3, "cpu")
    assert encoders.encoded == []
    (tmp_path / "shard_000000.tar").unlink()
    write_clips(tmp_path, 3, "cpu")
    assert encoders.encoded == [scene(0).caption, scene(1).caption]
    assert files(tmp_path) == whole


def test_stopped_and_run_again(encoders, tmp_path, monkeypatch):
    """In the fourth of five clips; the third, of a shard that was not whole, stays."""
    write_clips(tmp_path / "whole", 5, "cpu")
    encoders.encoded.clear()

    turns = iter(range(5))

    def stopped(scenes, device):
        if next(turns) == 3:
            raise KeyboardInterrupt
        return render(scenes, device)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "render", stopped)
        with pytest.raises(KeyboardInterrupt):
            write_clips(tmp_path / "cut", 5, "cpu")
    assert [scene(number).caption for number in range(3)] == encoders.encoded
    with pytest.raises(ValueError, match="unfinished: 1 of 3 shards"):
        LatentDataset(tmp_path / "cut", MODEL, batch=1)
    encoders.encoded.clear()
    write_clips(tmp_path / "cut", 5, "cpu")
    assert scene(0).caption not in encoders.encoded
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


@pytest.mark.parametrize("count", [0, -1, HELD_OUT + 1])
def test_clips_that_are_not_for_training(tmp_path, count):
    with pytest.raises(ValueError, match=f"training clips, got {count}"):
        write_clips(tmp_path / "none", count, "cpu")
    assert not (tmp_path / "none").exists()
