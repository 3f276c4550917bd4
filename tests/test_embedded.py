"""The shipped models, through the loaders and the command line that users' models go through."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer, UMT5EncoderModel

from turbodit import __version__
from turbodit.checkpoints import load_transformer
from turbodit.checkpoints.folder import EMBEDDED
from turbodit.cli import main
from turbodit.config import PRESETS
from turbodit.pipeline import Pipeline
from turbodit.quantization import QuantizedLinear
from turbodit.spritewan.judge import load_judge, score
from turbodit.spritewan.train_vae import to_signed
from turbodit.spritewan.world import BACKGROUNDS, HELD_OUT, MOTIONS, OBJECTS, render, scene
from turbodit.text_encoder import TextEncoder
from turbodit.vae import VideoVAE

FOLDER = EMBEDDED["spritewan"].path
MODEL = PRESETS["spritewan"]
SHORT = ("--frames", "5", "--steps", "2", "--seed", "3", "--device", "cpu")


def generate(*arguments: object) -> int:
    return main(["generate", *map(str, arguments), *SHORT])


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


# The files.


def test_files_are_small_enough_for_any_transport() -> None:
    sizes = [path.stat().st_size for path in FOLDER.parent.rglob("*") if path.is_file()]
    assert max(sizes) <= 16 * 2**20
    assert sum(sizes) <= 48e6


# What they make.


@pytest.mark.parametrize("name", EMBEDDED)
def test_the_demo_shows_what_its_prompt_says(name: str) -> None:
    pipe = Pipeline.from_pretrained(name, device="cpu")
    video = pipe("a big red fox runs to the right through the snow", seed=0)
    verdict = load_judge().predict(torch.from_numpy(video.frames).permute(0, 3, 1, 2)[None])
    seen = (
        OBJECTS[verdict.object_logits.argmax()],
        MOTIONS[verdict.motion_logits.argmax()],
        BACKGROUNDS[verdict.background_logits.argmax()],
    )
    wanted = ("fox", "moving right", "snow")
    assert seen == wanted


def test_the_default_has_8_bits() -> None:
    (model,) = Pipeline.from_pretrained(device="cpu").transformers.values()
    linears = [layer for layer in model.blocks.modules() if isinstance(layer, QuantizedLinear)]
    assert {layer.format for layer in linears} == {"int8-channel"}
    assert not any(isinstance(layer, torch.nn.Linear) for layer in model.blocks.modules())


def test_the_teacher_is_dense_and_exact() -> None:
    model = load_transformer(FOLDER / "teacher")
    assert not any(isinstance(layer, QuantizedLinear) for layer in model.modules())
    assert not any("proj_l" in name for name in model.state_dict())


# The command line.


STUDENT = {"weights": "spritewan", "solver": "few-step", "steps": 4, "guidance": 1}
TEACHER = {"weights": "spritewan-teacher", "solver": "unipc", "steps": 20, "guidance": 3}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), STUDENT),
        (("--model", "spritewan-teacher"), TEACHER),
    ],
    ids=["default", "teacher"],
)
def test_settings_that_are_left_out(
    flags: tuple[str, ...],
    expected: dict[str, object],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    small = ["--size", "128*128", "--frames", "5", "--device", "cpu", "--json"]
    assert main(["generate", "a fox", *flags, *small, "-o", str(tmp_path / "fox.gif")]) == 0
    (video,) = json.loads(capsys.readouterr().out)["videos"]
    assert (expected | {"attention": "sdpa"}).items() <= video["settings"].items()


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clips") / "fox.mp4"
    assert generate("a large fox runs to the right", "-o", path) == 0
    return path


def test_the_clip_plays_in_browsers(clip: Path) -> None:
    with av.open(str(clip)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.format.name == "yuv420p"
        assert stream.average_rate == MODEL.fps
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert np.stack(frames).shape == (5, 256, 256, 3)
    assert np.std(frames) > 10, "an empty picture"
    content = clip.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat"), "not faststart"


def test_the_clip_says_how_it_was_made(clip: Path) -> None:
    with av.open(str(clip)) as container:
        comment = json.loads(container.metadata["comment"])
    record = json.loads(clip.with_name("fox.mp4.json").read_text(encoding="utf-8"))
    for origin in (comment, record):
        assert origin["turbodit"] == __version__
        assert (origin["prompt"], origin["seed"]) == ("a large fox runs to the right", 3)
        settings = origin["settings"]
        assert (settings["model"], settings["weights"]) == ("spritewan", "spritewan")
        assert (settings["solver"], settings["steps"]) == ("few-step", 2)
    assert [record[key] for key in ("frames", "height", "width", "fps")] == [5, 256, 256, 16]
    assert {"text", "denoise", "decode"} <= record["timings"].keys()


def test_the_same_seed_gives_the_same_bytes(clip: Path, tmp_path: Path) -> None:
    assert generate("a large fox runs to the right", "-o", tmp_path / "fox.mp4") == 0
    assert (tmp_path / "fox.mp4").read_bytes() == clip.read_bytes()


def test_an_image_is_kept_as_the_first_frame(tmp_path: Path) -> None:
    one = scene(HELD_OUT)
    still = render([one], frames=1)[0, 0].permute(1, 2, 0).numpy()
    Image.fromarray(still).save(tmp_path / "first.png")
    flags = ("--image", tmp_path / "first.png", "-o", tmp_path / "frames")
    assert generate(one.caption, *flags) == 0
    shown = np.asarray(Image.open(tmp_path / "frames" / "frame-00000.png"))
    error = np.square(shown.astype(float) - still).mean()
    assert 10 * np.log10(255**2 / error) >= 28


# The parts, in the libraries that they are written for.


def test_diffusers_loads_the_autoencoder_and_it_codes_alike() -> None:
    theirs = AutoencoderKLWan.from_pretrained(FOLDER / "vae", torch_dtype=torch.float32)
    ours = VideoVAE.from_pretrained(FOLDER / "vae")
    stride = (ours.latent_channels, ours.temporal_stride, ours.spatial_stride)
    assert stride == (
        MODEL.vae.latent_channels,
        MODEL.vae.temporal_stride,
        MODEL.vae.spatial_stride,
    )
    video = to_signed(render([scene(HELD_OUT + 1)], frames=5))[..., :128, :128]
    mean, std = (
        torch.tensor(statistic).view(1, -1, 1, 1, 1)
        for statistic in (theirs.config.latents_mean, theirs.config.latents_std)
    )
    with torch.no_grad():
        latents = (theirs.encode(video).latent_dist.mode() - mean) / std
        decoded = theirs.decode(latents * std + mean).sample
    assert relative_error(ours.encode(video), latents) <= 1e-5
    assert relative_error(ours.decode(latents), decoded) <= 1e-5


def test_transformers_loads_the_text_encoder_and_it_reads_alike() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "tokenizer")
    theirs = UMT5EncoderModel.from_pretrained(FOLDER / "text_encoder", dtype=torch.float32)
    length = MODEL.transformer.text_len
    ours = TextEncoder.from_pretrained(FOLDER / "text_encoder", FOLDER / "tokenizer", length)
    prompts = [scene(HELD_OUT).caption, "a cat"]
    tokens = tokenizer(prompts, padding="max_length", max_length=length, return_tensors="pt")
    with torch.no_grad():
        hidden = theirs(tokens.input_ids, tokens.attention_mask).last_hidden_state
    expected = hidden * tokens.attention_mask[..., None]
    assert expected.shape == (2, length, MODEL.transformer.text_dim)
    assert relative_error(ours.encode(prompts), expected) <= 1e-5
    assert tokenizer.unk_token_id not in tokens.input_ids


def test_diffusers_fills_its_transformer_and_it_predicts_alike() -> None:
    (folder,) = EMBEDDED["spritewan-teacher"].transformers
    # Not from_pretrained, which wants accelerate for this class.
    theirs = WanTransformer3DModel.from_config(WanTransformer3DModel.load_config(folder)).eval()
    state = {}
    for shard in folder.glob("*.safetensors"):
        state |= {name: tensor.float() for name, tensor in load_file(shard).items()}
    theirs.load_state_dict(state)
    ours = load_transformer(folder, dtype=torch.float32)
    shape = MODEL.transformer
    assert ours.config == shape
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, shape.in_dim, 3, 8, 8, generator=generator)
    context = torch.randn(2, shape.text_len, shape.text_dim, generator=generator)
    context[:, 20:] = 0
    t = torch.tensor([[0.0, 0.7, 0.7], [0.2, 0.2, 0.2]])  # the first clip has its first frame
    with torch.no_grad():
        per_token = 1000 * t.repeat_interleave(16, dim=1)
        expected = theirs(latents, per_token, context, return_dict=False)[0]
        assert relative_error(ours(latents, t, context), expected) <= 1e-5


def test_the_judge_knows_held_out_clips() -> None:
    scenes = [scene(HELD_OUT + index) for index in range(16)]
    accuracies = score(load_judge().predict(render(scenes)), scenes)
    assert min(accuracies.values()) >= 0.9, accuracies


# Broken copies.


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the model's folder that may be broken."""
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path / "cache"))
    return Path(shutil.copytree(FOLDER, tmp_path / "copy"))


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_truncated_weights_are_named(
    copy: Path, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = sorted((copy / part).glob("*.safetensors"))[-1]
    with weights.open("r+b") as file:
        file.truncate(weights.stat().st_size // 2)
    assert generate("a fox", "--model", copy, "-o", copy / "fox.mp4") == 2
    assert f"{weights} is truncated" in capsys.readouterr().err
    assert not (copy / "fox.mp4").exists()


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "tokenizer"])
def test_missing_parts_are_named(copy: Path, part: str, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(copy / part)
    assert generate("a fox", "--model", copy, "-o", copy / "fox.mp4") == 2
    assert f"{copy} has no {part}; found" in capsys.readouterr().err


def test_truncated_packed_weights_are_named(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = sorted((copy / "teacher").glob("*.safetensors.xz"))[0]
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size // 2)
    flags = ("--model", copy, "--transformer", copy / "teacher", "-o", copy / "fox.mp4")
    assert generate("a fox", *flags) == 2
    assert f"{shard} is truncated" in capsys.readouterr().err
    assert not (copy / "fox.mp4").exists()


def test_missing_shards_are_named(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = sorted((copy / "teacher").glob("*.safetensors.xz"))[0]
    shard.unlink()
    flags = ("--model", copy, "--transformer", copy / "teacher", "-o", copy / "fox.mp4")
    assert generate("a fox", *flags) == 2
    assert f"{shard.stem} are missing" in capsys.readouterr().err
