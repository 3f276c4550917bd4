from __future__ import annotations

import dataclasses
import json

import pytest
from PIL import Image

from turbodit.config import PRESETS
from turbodit.request import GenerationRequest, resolve

T2V = PRESETS["Wan2.1-T2V-14B"]
I2V = PRESETS["Wan2.1-I2V-14B-480P"]
A14B = PRESETS["Wan2.2-T2V-A14B"]
TI2V = PRESETS["Wan2.2-TI2V-5B"]
FLF = PRESETS["Wan2.1-FLF2V-14B-720P"]
SPRITE = PRESETS["spritewan"]
PICTURE = Image.new("RGB", (300, 200), "red")


def settings(model, prompt="a fox", **options):
    return resolve(GenerationRequest(prompt, **options), model)


def test_defaults_are_the_models():
    s = settings(T2V)
    assert (s.width, s.height, s.frames, s.fps) == (1280, 720, 81, 16)
    assert (s.solver, s.steps, s.shift, s.guidance) == ("unipc", 50, 5.0, 5.0)
    assert s.negative_prompt == T2V.sampling.negative_prompt
    assert s.sigma_max is s.mid_times is s.ode is s.boundary is s.guidance_high_noise is None


@pytest.mark.parametrize(
    ("model", "size", "shift"),
    [
        ("Wan2.1-I2V-14B-720P", {}, 5.0),
        ("Wan2.1-I2V-14B-720P", {"resolution": "480p"}, 3.0),
        ("Wan2.1-I2V-14B-480P", {}, 3.0),
        ("Wan2.1-I2V-14B-480P", {"width": 1280, "height": 720}, 5.0),
        ("Wan2.1-T2V-14B", {"resolution": "480p"}, 5.0),
    ],
)
def test_small_frames_of_an_image_model_have_a_shift_of_their_own(model, size, shift):
    image = PICTURE if "I2V" in model else None
    assert settings(PRESETS[model], image=image, **size).shift == shift
    assert settings(PRESETS[model], image=image, shift=7.0, **size).shift == 7.0


def test_two_experts_have_their_own_guidance():
    s = settings(A14B)
    assert (s.guidance, s.guidance_high_noise, s.boundary) == (3.0, 4.0, 0.875)
    s = settings(A14B, guidance=2.0)
    assert (s.guidance, s.guidance_high_noise) == (2.0, 2.0)
    s = settings(A14B, guidance_high_noise=1.0, boundary=0.9)
    assert (s.guidance, s.guidance_high_noise, s.boundary) == (3.0, 1.0, 0.9)


def test_few_step_defaults():
    s = settings(T2V, solver="few-step")
    assert (s.steps, s.sigma_max, s.mid_times, s.ode) == (4, 80.0, (1.5, 1.4, 1.0), False)
    assert s.guidance == 1.0
    assert s.shift is s.negative_prompt is None
    assert settings(T2V, solver="few-step", steps=2).mid_times == (1.5,)
    assert settings(T2V, solver="few-step", mid_times=(1.5, 1.2, 1.0, 0.5)).steps == 5


def test_a_distilled_model_still_takes_many_steps_of_another_solver():
    sampling = dataclasses.replace(SPRITE.sampling, solver="few-step", steps=3)
    student = dataclasses.replace(SPRITE, sampling=sampling)
    assert settings(student).steps == 3
    assert settings(student, solver="euler").steps == 50


def test_guidance_of_a_distilled_model_is_what_it_says():
    sampling = dataclasses.replace(SPRITE.sampling, solver="few-step", steps=3, guidance=1.0)
    student = dataclasses.replace(SPRITE, sampling=sampling)
    assert settings(student).guidance == settings(student, solver="euler").guidance == 1.0
    assert settings(student).negative_prompt is None
    sampling = dataclasses.replace(
        A14B.sampling, solver="few-step", steps=4, guidance=2.0, guidance_high_noise=1.5
    )
    s = settings(dataclasses.replace(A14B, sampling=sampling))
    assert (s.guidance, s.guidance_high_noise) == (2.0, 1.5)
    s = settings(A14B, solver="few-step")  # not its own
    assert (s.guidance, s.guidance_high_noise) == (1.0, 1.0)


def test_seeds_count_on_from_the_first():
    s = settings(SPRITE, ["a", "b"], seed=7, num_videos=2)
    assert s.prompts == ("a", "a", "b", "b")
    assert s.seeds == (7, 8, 9, 10)
    assert settings(SPRITE, ["a", "b"], seed=[5, 5]).seeds == (5, 5)
    assert settings(SPRITE).seeds != settings(SPRITE).seeds


def test_summary_is_plain_and_leaves_out_what_does_not_apply():
    summary = settings(TI2V, image=PICTURE).summary()
    assert json.loads(json.dumps(summary)) == summary
    assert {"prompts", "seeds", "image", "boundary", "sigma_max"}.isdisjoint(summary)


@pytest.mark.parametrize(
    ("model", "options", "size"),
    [
        (T2V, {"resolution": "480p", "aspect_ratio": "9:16"}, (480, 832)),
        (T2V, {"aspect_ratio": "1:1"}, (960, 960)),
        (T2V, {"width": 320, "height": 176}, (320, 176)),
        # 832 * 480 pixels at 3:2, rounded down to multiples of 16.
        (I2V, {"image": PICTURE}, (768, 512)),
        (I2V, {"image": PICTURE, "aspect_ratio": "16:9"}, (832, 480)),
        (SPRITE, {"image": PICTURE}, (256, 256)),
    ],
)
def test_sizes(model, options, size):
    s = settings(model, **options)
    assert (s.width, s.height) == size
    if s.image is not None:
        assert s.image.size == size


def test_images_are_upright_rgb_and_centre_cropped(tmp_path):
    wide = Image.new("RGB", (300, 100), "red")
    wide.paste((0, 0, 255), (100, 0, 200, 100))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side: to be turned by 90 degrees
    wide.save(tmp_path / "side.png", exif=exif)
    first = settings(TI2V, image=tmp_path / "side.png", width=64, height=192).image
    assert first.getpixel((32, 96)) == (0, 0, 255)
    assert first.getpixel((32, 8)) == (255, 0, 0)
    cropped = settings(TI2V, image=wide, width=64, height=64).image
    assert {cropped.getpixel((x, 32)) for x in (4, 32, 60)} == {(0, 0, 255)}
    assert settings(TI2V, image=Image.new("RGBA", (64, 64))).image.mode == "RGB"


def test_unreadable_images(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        settings(TI2V, image=tmp_path / "nowhere.png")
    text = tmp_path / "text.png"
    text.write_text("not an image")
    with pytest.raises(ValueError, match=r"cannot read image .*text\.png"):
        settings(TI2V, image=text)
    PICTURE.resize((400, 400)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:200])
    with pytest.raises(ValueError, match="cannot read image"):
        settings(TI2V, image=tmp_path / "cut.png")


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (T2V, {"prompt": "  "}, "prompt is empty"),
        (T2V, {"prompt": []}, "no prompt"),
        (T2V, {"frames": 80}, "nearest: 77 and 81"),
        (T2V, {"frames": 0}, "frames must be positive"),
        (T2V, {"frames": 10**6 + 1}, "tokens"),
        (T2V, {"width": 0, "height": 480}, "nearest: 16x480"),
        (T2V, {"width": -16, "height": 480}, "nearest: 16x480"),
        (T2V, {"width": 830, "height": 480}, "nearest: 832x480"),
        (T2V, {"width": 10**6, "height": 480}, "up to 16384; nearest: 16384x480"),
        (T2V, {"width": 16384, "height": 16384}, "tokens"),
        (T2V, {"width": 832}, "both width and height"),
        (T2V, {"width": 832, "height": 480, "resolution": "480p"}, "not both"),
        (TI2V, {"width": 832, "height": 480, "frames": 120}, "nearest: 117 and 121"),
        (TI2V, {"width": 848, "height": 480}, "multiple of 32"),
        (T2V, {"resolution": "1080p"}, "supported: 720p, 480p"),
        (T2V, {"aspect_ratio": "2:1"}, "supported: 16:9"),
        (T2V, {"fps": 0}, "fps"),
        (T2V, {"steps": 0}, "steps must be between"),
        (T2V, {"steps": "4"}, "steps must be a whole number"),
        (T2V, {"guidance": 0.5}, "1 .off. or more"),
        (T2V, {"guidance": float("nan")}, "finite"),
        (T2V, {"shift": 0}, "shift must be positive"),
        (T2V, {"solver": "ddim"}, "supported: unipc"),
        (T2V, {"sigma_max": 80.0}, "belongs to the few-step solver"),
        (T2V, {"solver": "few-step", "steps": 5}, "1 to 4"),
        (T2V, {"solver": "few-step", "shift": 5.0}, "no meaning"),
        (T2V, {"solver": "few-step", "negative_prompt": "blur"}, "without guidance"),
        (T2V, {"solver": "few-step", "mid_times": ["x"]}, "mid_times"),
        (T2V, {"boundary": 0.9}, "one expert"),
        (A14B, {"boundary": 1.5}, "between 0 and 1"),
        (T2V, {"solver": "few-step", "mid_times": 3}, "mid_times must be finite numbers, got 3"),
        (T2V, {"prompt": 5}, "a prompt must be text, got 5"),
        (T2V, {"prompt": ["a fox", 5]}, "a prompt must be text, got 5"),
        (T2V, {"num_videos": 0}, "num_videos must be a positive whole number, got 0"),
        (T2V, {"num_videos": None}, "num_videos must be a positive whole number, got None"),
        (T2V, {"seed": -1}, "seed"),
        (T2V, {"seed": 1.5}, r"whole number from 0 to 2\^63 - 1, got 1\.5"),
        (T2V, {"seed": True}, "whole number .* got True"),
        (T2V, {"seed": {}}, r"whole number .* got \{\}"),
        (T2V, {"seed": 2**63 - 1, "num_videos": 2}, "whole number .* got 9223372036854775808"),
        (T2V, {"seed": [1, 2]}, "2 seeds for 1 videos"),
        (T2V, {"image": PICTURE}, "text alone"),
        (I2V, {}, "needs an image"),
        (I2V, {"image": PICTURE, "last_image": PICTURE}, "does not take a last_image"),
        (FLF, {"image": PICTURE}, "needs last_image"),
        (TI2V, {"last_image": PICTURE}, "does not take a last_image"),
        (TI2V, {"image": 5}, "image must be a path or image"),
        (I2V, {"image": Image.new("RGB", (9000, 1))}, "too narrow"),
    ],
)
def test_what_cannot_be_done_is_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        settings(model, **options)
