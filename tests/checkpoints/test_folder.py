from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tests.native_models import tiny_native_folder
from tests.tiny_models import BOUNDARY, WITH_CLIP, Variant, tiny_diffusers_folder

from turbodit.checkpoints import ModelFolder, find_model, load_transformer
from turbodit.config import PRESETS, VAEConfig
from turbodit.image_encoder import ImageEncoder
from turbodit.text_encoder import TextEncoder
from turbodit.vae import VideoVAE

VARIANTS = ["t2v", "i2v", "flf2v", "t2v-a14b", "i2v-a14b", "ti2v"]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", ["diffusers", "native"])
def test_every_part_is_found_and_loads(variant: Variant, layout: str, tmp_path: Path) -> None:
    write = tiny_diffusers_folder if layout == "diffusers" else tiny_native_folder
    folder = find_model(write(tmp_path / "model", variant))

    assert folder.layout == layout
    assert len(folder.transformers) == (2 if variant in BOUNDARY else 1)
    experts = [load_transformer(source) for source in folder.transformers]
    if len(experts) == 2:  # the high-noise expert comes first
        high = load_transformer(
            folder.path / ("transformer" if layout == "diffusers" else "high_noise_model")
        )
        first, second = (expert.head.head.weight for expert in experts)
        assert first.equal(high.head.head.weight) and not first.equal(second)
    vae = VideoVAE.from_pretrained(folder.vae)
    assert vae.latent_channels == experts[0].config.out_dim
    text = TextEncoder.from_pretrained(folder.text_encoder, folder.tokenizer)
    assert text.dim == experts[0].config.text_dim
    if variant in WITH_CLIP:
        ImageEncoder.from_pretrained(folder.image_encoder, folder.image_processor)
    else:
        with pytest.raises(FileNotFoundError, match=r"has no .*(clip|image_encoder)"):
            _ = folder.image_encoder


@pytest.mark.parametrize("variant", VARIANTS)
def test_folder_that_is_no_preset(variant: Variant, tmp_path: Path) -> None:
    folder = find_model(tiny_diffusers_folder(tmp_path / "mine", variant))

    model = folder.config()

    assert model.name == "mine"
    assert model.task == variant.split("-")[0]
    assert model.sampling.boundary == BOUNDARY.get(variant)
    assert model.experts == len(folder.transformers)
    assert model.vae == (VAEConfig(48, 4, 16) if variant == "ti2v" else VAEConfig(16, 4, 8))
    assert model.transformer.dim == 24


def test_original_folder_that_is_no_preset(tmp_path: Path) -> None:
    assert find_model(tiny_native_folder(tmp_path / "ti2v", "ti2v")).config().task == "ti2v"
    experts = find_model(tiny_native_folder(tmp_path / "experts", "t2v-a14b"))
    with pytest.raises(ValueError, match=r"2 transformer.*boundary_ratio.*is None"):
        experts.config()


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_recognised(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preset = PRESETS[name]
    seen = replace(preset.transformer, text_len=512)  # diffusers' config does not tell it
    monkeypatch.setattr("turbodit.checkpoints.folder.transformer_config", lambda source: seen)
    path = tmp_path / f"models--Wan-AI--{name}-Diffusers" / "snapshots" / "0123"
    vae = {
        "_class_name": "AutoencoderKLWan",
        "z_dim": preset.vae.latent_channels,
        "scale_factor_spatial": preset.vae.spatial_stride,
    }
    (path / "vae").mkdir(parents=True)
    (path / "vae" / "config.json").write_text(json.dumps(vae))
    index = {"boundary_ratio": preset.sampling.boundary, "transformer_2": [None, None]}
    for part in ("transformer", "transformer_2")[: preset.experts]:
        (path / part).mkdir()
        index[part] = ["diffusers", "WanTransformer3DModel"]
    (path / "model_index.json").write_text(json.dumps(index))

    assert ModelFolder(path).config() == preset


def test_boundary_of_the_folder_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = find_model(tiny_diffusers_folder(tmp_path, "t2v-a14b"))
    tiny = replace(PRESETS["Wan2.2-T2V-A14B"], transformer=folder.config().transformer)
    monkeypatch.setitem(PRESETS, "tiny", tiny)
    assert folder.config() == tiny
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"boundary_ratio": 0.5}))
    assert folder.config().sampling.boundary == 0.5


def state(transformer: Path, **stated: object) -> None:
    path = transformer / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | stated))


def test_files_state_how_they_are_sampled(tmp_path: Path) -> None:
    folder = find_model(tiny_diffusers_folder(tmp_path / "base"))
    student = tiny_diffusers_folder(tmp_path / "student") / "transformer"
    own = folder.config().sampling
    state(student, sampling={"solver": "few-step", "steps": 2, "sigma_max": 120.0})
    expected = replace(own, solver="few-step", steps=2, sigma_max=120.0, guidance=1.0)
    assert folder.config((student,)).sampling == expected
    assert folder.config().sampling == own
    state(student, sampling={"solver": "few-step"})
    assert folder.config((student,)).sampling.steps == 4
    state(student, sampling={"solver": "few-step", "guidance": 2.0})
    assert folder.config((student,)).sampling.guidance == 2.0
    state(student, sampling={"steps": 30})
    assert folder.config((student,)).sampling == replace(own, steps=30)
    state(student, sampling={"speed": 30})
    with pytest.raises(ValueError, match=r"transformer/config\.json: sampling has no speed; supp"):
        folder.config((student,))
    state(student, sampling={"boundary": 0.9})
    with pytest.raises(ValueError, match=r"state sampling boundary 0\.9, but base has one expert"):
        folder.config((student,))


def test_a_stated_shift_is_for_all_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = find_model(tiny_diffusers_folder(tmp_path, "i2v"))
    known = PRESETS["Wan2.1-I2V-14B-480P"]
    monkeypatch.setitem(PRESETS, "i2v", replace(known, transformer=folder.config().transformer))
    state(folder.path / "transformer", sampling={"shift": 8.0})
    expected = replace(known.sampling, shift=8.0, shift_480p=None)
    assert folder.config().sampling == expected


def test_experts_state_the_same(tmp_path: Path) -> None:
    folder = find_model(tiny_diffusers_folder(tmp_path, "t2v-a14b"))
    few = {"solver": "few-step", "steps": 4}
    state(tmp_path / "transformer", sampling=few)
    with pytest.raises(ValueError, match=r"same sampling; .*/transformer states .*transformer_2 n"):
        folder.config()
    state(tmp_path / "transformer_2", sampling=few)
    sampling = folder.config().sampling
    assert (sampling.steps, sampling.guidance, sampling.guidance_high_noise) == (4, 1.0, 1.0)
    assert sampling.boundary == BOUNDARY["t2v-a14b"]
    for part in folder.transformers:
        state(part, sampling=few | {"guidance_high_noise": None})
    with pytest.raises(ValueError, match=r"guidance_high_noise None, but .* has two experts"):
        folder.config()


def test_other_transformers_in_a_folder_without_its_own(tmp_path: Path) -> None:
    folder = find_model(tiny_native_folder(tmp_path / "base"))
    (folder.path / "config.json").unlink()
    (folder.path / "diffusion_pytorch_model.safetensors").unlink()
    other = tiny_diffusers_folder(tmp_path / "other") / "transformer"
    assert folder.config((other,)).transformer.dim == 24
    with pytest.raises(FileNotFoundError, match=r"base has no config\.json; found .*Wan2.1_VAE"):
        folder.config()


def test_transformer_of_another_vae(tmp_path: Path) -> None:
    folder = find_model(tiny_diffusers_folder(tmp_path / "t2v", "t2v"))
    other = tiny_diffusers_folder(tmp_path / "ti2v", "ti2v") / "transformer"
    with pytest.raises(ValueError, match=r"turns 48 channels into 48, expected 16 \(or 36"):
        folder.config((other,))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "AutoencoderKL", "z_dim": 16}, "AutoencoderKL; supported: AutoencoderKLW"),
        ({"_class_name": "AutoencoderKLWan"}, "does not say 'z_dim'"),
        (["AutoencoderKLWan"], "holds a list, expected a JSON object"),
        (None, r"no config\.json in .*vae"),
    ],
)
def test_vae_that_is_none_of_ours(config: object, message: str, tmp_path: Path) -> None:
    folder = find_model(tiny_diffusers_folder(tmp_path))
    path = folder.vae / "config.json"
    path.unlink() if config is None else path.write_text(json.dumps(config))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        folder.config()


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "tokenizer"])
def test_missing_part(part: str, tmp_path: Path) -> None:
    folder = find_model(tiny_diffusers_folder(tmp_path))
    (tmp_path / part).rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=f"has no {part}; found elsewhere, model_index"):
        _ = folder.transformers, folder.vae, folder.text_encoder, folder.tokenizer


def test_no_model_folder(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(FileNotFoundError, match=r"no model folder.*found holiday\.jpg"):
        _ = find_model(tmp_path).layout
    with pytest.raises(FileNotFoundError, match=r"holiday\.jpg is a file"):
        find_model(tmp_path / "holiday.jpg")
    for name in (str(tmp_path / "none"), "./none", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="no model folder at"):
            find_model(name)
    with pytest.raises(FileNotFoundError, match=r"no model 'wan'.*Wan2\.1-T2V-1\.3B.*-teacher"):
        find_model("wan")


def test_the_embedded_models_share_all_but_the_transformer() -> None:
    student, teacher = find_model("spritewan"), find_model("SpriteWan-Teacher")
    assert student.path == teacher.path
    assert [part.name for part in student.transformers] == ["transformer"]
    assert [part.name for part in teacher.transformers] == ["teacher"]
    assert (student.vae, student.text_encoder) == (teacher.vae, teacher.text_encoder)
    assert teacher.config() == PRESETS["spritewan"]
    assert replace(student.config(), sampling=teacher.config().sampling) == teacher.config()


def test_a_transformer_under_another_name(tmp_path: Path) -> None:
    path = tiny_diffusers_folder(tmp_path / "model")
    (path / "transformer").rename(path / "first")
    folder = ModelFolder(path, transformer_name="first")
    assert folder.transformers == (path / "first",)
    with pytest.raises(FileNotFoundError, match="has no other; found first"):
        _ = ModelFolder(path, transformer_name="other").transformers


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def snapshot_download(repository: str) -> str:
        asked.append(repository)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert find_model("SpriteWan").path.parts[-2:] == ("assets", "spritewan")
    assert find_model("Wan-AI/Wan2.1-T2V-1.3B").path == tmp_path
    assert find_model("wan2.1-t2v-1.3b").path == tmp_path
    assert asked == ["Wan-AI/Wan2.1-T2V-1.3B", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"]


def test_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(repository: str) -> str:
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(FileNotFoundError, match="Hub failed: no network"):
        find_model("Wan-AI/Wan2.1-T2V-1.3B")
