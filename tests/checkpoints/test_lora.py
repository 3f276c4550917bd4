"""LoRA files of all forms, read, written and merged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.checkpoints.small_disk import files_of_at_most
from tests.native_models import native_transformer
from tests.tiny_models import TEXT_DIM, tiny_diffusers_folder, tiny_transformer

from turbodit.checkpoints import load_transformer
from turbodit.checkpoints.lora import read_lora, write_lora
from turbodit.checkpoints.merge import merge_loras
from turbodit.checkpoints.transformer import config_json
from turbodit.checkpoints.write import CONFIG_KEY, write_file
from turbodit.config import TransformerConfig
from turbodit.weights import LazyTensor, read_metadata

State = dict[str, torch.Tensor]

CONFIG = TransformerConfig(
    dim=24, ffn_dim=40, num_heads=2, num_layers=2, text_dim=TEXT_DIM, freq_dim=32
)
RANK, ALPHA = 3, 1.5
# Original and diffusers' names, and kohya's.
LAYERS = {
    "blocks.0.self_attn.q": ("blocks.0.attn1.to_q", "blocks_0_self_attn_q"),
    "blocks.1.cross_attn.o": ("blocks.1.attn2.to_out.0", "blocks_1_cross_attn_o"),
    "blocks.1.ffn.0": ("blocks.1.ffn.net.0.proj", "blocks_1_ffn_0"),
    "time_projection.1": ("condition_embedder.time_proj", "time_projection_1"),
}
BRANCH = {
    f"blocks.{block}.self_attn.attn_op.local_attn.proj_l.{kind}": shape
    for block in range(2)
    for kind, shape in (("weight", (12, 12)), ("bias", (12,)))
}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def base_state() -> State:
    return native_transformer(tiny_transformer("t2v"))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    weights = {name: LazyTensor.of(tensor) for name, tensor in base_state().items()}
    write_file(tmp_path / "base.safetensors", weights, config_json(CONFIG, None))
    return tmp_path / "base.safetensors"


@pytest.fixture(scope="module")
def factors() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """down and up by original layer name."""
    state = base_state()
    shapes = {layer: state[f"{layer}.weight"].shape for layer in LAYERS}
    return {
        layer: (random(RANK, columns, seed=2 * i), random(rows, RANK, seed=2 * i + 1))
        for i, (layer, (rows, columns)) in enumerate(shapes.items())
    }


def file_of(form: str, factors: dict[str, tuple[torch.Tensor, torch.Tensor]], path: Path) -> Path:
    """A file as `form`'s programs write it, put together by hand."""
    tensors: State = {}
    metadata = {"format": "pt"}
    for layer, (down, up) in factors.items():
        diffusers, kohya = LAYERS[layer]
        prefix, first, second = {
            "peft": (f"transformer.{diffusers}", "lora_A", "lora_B"),
            "peft-metadata": (f"transformer.{diffusers}", "lora_A", "lora_B"),
            "native-ab": (f"diffusion_model.{layer}", "lora_A", "lora_B"),
            "native-down": (f"diffusion_model.{layer}", "lora_down", "lora_up"),
            "bare": (layer, "lora_down", "lora_up"),
            "kohya": (f"lora_unet_{kohya}", "lora_down", "lora_up"),
        }[form]
        tensors |= {f"{prefix}.{first}.weight": down, f"{prefix}.{second}.weight": up}
        if form in ("native-down", "kohya", "bare"):
            tensors[f"{prefix}.alpha"] = torch.tensor(ALPHA)
    if form == "peft-metadata":
        stated = {"transformer.r": RANK, "transformer.lora_alpha": ALPHA}
        metadata["lora_adapter_metadata"] = json.dumps(stated | {"transformer.alpha_pattern": {}})
    save_file(tensors, path, metadata)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("form", "alpha"),
    [
        ("peft", RANK),
        ("peft-metadata", ALPHA),
        ("native-ab", RANK),
        ("native-down", ALPHA),
        ("bare", ALPHA),
        ("kohya", ALPHA),
    ],
)
def test_forms(form: str, alpha: float, dtype: torch.dtype, base: Path, factors, tmp_path) -> None:
    factors = {layer: (a.to(dtype), b.to(dtype)) for layer, (a, b) in factors.items()}
    lora = file_of(form, factors, tmp_path / "lora.safetensors")

    report = merge_loras(base, [(lora, 0.7)], tmp_path / "out.safetensors")

    written, before = load_file(tmp_path / "out.safetensors"), base_state()
    assert report.merged == tuple(f"{layer}.weight" for layer in factors)
    assert not report.copied and not report.missing
    assert set(report.kept.values()) == {"not in a LoRA"}
    assert set(report.kept) | set(report.merged) == set(before) == set(written)
    for name in report.kept:
        assert written[name].equal(before[name]), name
    for layer, (down, up) in factors.items():
        name = f"{layer}.weight"
        change = 0.7 * alpha / RANK * (up.double() @ down.double())
        # Float32: a rounding for each of the rank's products, and three more.
        torch.testing.assert_close(
            written[name].double(), before[name].double() + change, rtol=1e-6, atol=1e-6
        )
    assert not list(tmp_path.glob(".*"))


def test_whole_differences(base: Path, tmp_path: Path) -> None:
    before = base_state()
    changes = {
        "diffusion_model.blocks.0.norm3.diff": ("blocks.0.norm3.weight", (24,)),
        "diffusion_model.blocks.0.norm3.diff_b": ("blocks.0.norm3.bias", (24,)),
        "diffusion_model.blocks.1.modulation.diff": ("blocks.1.modulation", (1, 6, 24)),
        "diffusion_model.blocks.1.ffn.2.diff_b": ("blocks.1.ffn.2.bias", (24,)),
        "diffusion_model.patch_embedding.diff": ("patch_embedding.weight", (24, 16, 1, 2, 2)),
        "diffusion_model.head.modulation.diff": ("head.modulation", (1, 2, 24)),
    }
    tensors = {key: random(*shape) for key, (_, shape) in changes.items()}
    save_file(tensors, tmp_path / "lora.safetensors")
    merge_loras(base, [(tmp_path / "lora.safetensors", 2.0)], tmp_path / "out.safetensors")
    written = load_file(tmp_path / "out.safetensors")
    for key, (name, _) in changes.items():
        assert written[name].equal(before[name] + 2 * tensors[key]), name


def test_convolutions(base: Path, tmp_path: Path) -> None:
    down, up = random(RANK, 16, 1, 2, 2), random(24, RANK, 1, 1, 1, seed=1)
    prefix = "lora_unet_patch_embedding"
    tensors = {f"{prefix}.lora_down.weight": down, f"{prefix}.lora_up.weight": up}
    save_file(tensors, tmp_path / "lora.safetensors")
    merge_loras(base, [(tmp_path / "lora.safetensors", 1.0)], tmp_path / "out.safetensors")
    change = torch.einsum("or,rcthw->octhw", up[:, :, 0, 0, 0], down)
    written = load_file(tmp_path / "out.safetensors")["patch_embedding.weight"]
    torch.testing.assert_close(written, base_state()["patch_embedding.weight"] + change)


def test_several(base: Path, factors, tmp_path: Path) -> None:
    """Their changes add up, whatever their form."""
    one = file_of("peft", factors, tmp_path / "one.safetensors")
    torch.save(load_file(file_of("kohya", factors, tmp_path / "two.safetensors")),
               tmp_path / "two.pt")  # fmt: skip
    loras = [(one, 1.0), (tmp_path / "two.pt", -RANK / ALPHA)]
    merge_loras(base, loras, tmp_path / "out.safetensors")
    written = load_file(tmp_path / "out.safetensors")
    for name, tensor in base_state().items():
        torch.testing.assert_close(written[name], tensor, rtol=1e-5, atol=1e-5)


def test_an_image_to_video_model_and_a_lora_of_another(tmp_path: Path) -> None:
    """The patch embedding of another condition is kept, CLIP's layers are missed."""
    model = tiny_diffusers_folder(tmp_path / "i2v", "i2v")
    tensors = {
        "diffusion_model.patch_embedding.diff": random(24, 16, 1, 2, 2),
        "diffusion_model.blocks.0.self_attn.q.diff": random(24, 24),
    }
    save_file(tensors, tmp_path / "t2v.safetensors")
    report = merge_loras(model, [(tmp_path / "t2v.safetensors", 1.0)], tmp_path / "out")
    assert report.merged == ("blocks.0.self_attn.q.weight",)
    shapes = "shape (24, 36, 1, 2, 2) in base, (24, 16, 1, 2, 2) in "
    assert report.kept["patch_embedding.weight"].startswith(shapes)
    load_transformer(tmp_path / "out")

    model = tiny_diffusers_folder(tmp_path / "t2v", "t2v")
    tensors = {
        "diffusion_model.blocks.0.cross_attn.k_img.diff": random(24, 24),
        "diffusion_model.img_emb.proj.1.diff_b": random(1280),
        "diffusion_model.blocks.0.cross_attn.k.diff": random(24, 24),
    }
    save_file(tensors, tmp_path / "i2v.safetensors")
    report = merge_loras(model, [(tmp_path / "i2v.safetensors", 1.0)], tmp_path / "other")
    missing = ("blocks.0.cross_attn.k_img.weight", "img_emb.proj.1.bias")
    assert report.missing == dict.fromkeys(missing, "not in base")
    assert report.merged == ("blocks.0.cross_attn.k.weight",)
    del tensors["diffusion_model.blocks.0.cross_attn.k.diff"]
    save_file(tensors, tmp_path / "i2v.safetensors")
    with pytest.raises(ValueError, match=r"nothing to merge into base .*k_img"):
        merge_loras(model, [(tmp_path / "i2v.safetensors", 1.0)], tmp_path / "other", force=True)


@pytest.mark.parametrize("names", ["diffusers", "native"])
def test_round_trip(names: str, base: Path, factors, tmp_path: Path) -> None:
    """What we write we read, with a linear branch and what it was trained with."""
    path = tmp_path / "lora.safetensors"
    branch = {name: random(*shape, seed=9) for name, shape in BRANCH.items()}
    stated = {"attention": "sla", "attention_settings": {"ratio": 0.15}}
    write_lora(path, factors, ALPHA, names, branch, stated)

    lora = read_lora(path, CONFIG)

    assert lora.stated == stated
    assert {name: tensor.read().tolist() for name, tensor in lora.linear_branch.items()} == {
        name: tensor.tolist() for name, tensor in branch.items()
    }
    for layer, (down, up) in factors.items():
        got = lora.deltas[f"{layer}.weight"]
        assert got.shape == (up.shape[0], down.shape[1])
        torch.testing.assert_close(got.read(), ALPHA / RANK * up @ down)
    stored = load_file(path)
    if names == "diffusers":
        assert "transformer.blocks.0.attn1.to_q.lora_A.weight" in stored
        peft = json.loads(read_metadata(path)["lora_adapter_metadata"])
        assert peft["transformer.r"] == RANK and peft["transformer.lora_alpha"] == ALPHA
        modules = [diffusers for diffusers, _ in LAYERS.values()]
        assert peft["transformer.target_modules"] == sorted(modules)
    else:
        assert stored["diffusion_model.blocks.0.self_attn.q.alpha"].item() == ALPHA

    report = merge_loras(base, [(path, 0.5)], tmp_path / "out.safetensors")
    assert set(report.copied) == set(BRANCH)
    written = load_file(tmp_path / "out.safetensors")
    assert all(written[name].equal(tensor) for name, tensor in branch.items())
    said = json.loads(read_metadata(tmp_path / "out.safetensors")[CONFIG_KEY])
    assert stated.items() <= said.items()
    load_transformer(tmp_path / "out.safetensors", attention="sla")
    with pytest.raises(ValueError, match=r"another LoRA brought a linear branch"):
        merge_loras(base, [(path, 0.5), (path, 0.5)], tmp_path / "other")


def test_a_disk_that_takes_no_more(factors, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    with files_of_at_most(2_000), pytest.raises(OSError) as error:
        write_lora(path, factors, ALPHA, "diffusers", {}, {})
    assert error.value.strerror == f"cannot write {path}: File too large"
    assert not list(tmp_path.iterdir())
    write_lora(path, factors, ALPHA, "diffusers", {}, {})
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_diffusers_takes_our_metadata(factors, tmp_path: Path) -> None:
    """It reads names, and the arguments of PEFT's LoraConfig, from the file."""
    from diffusers.loaders import WanLoraLoaderMixin

    path = tmp_path / "lora.safetensors"
    write_lora(path, factors, ALPHA, "diffusers", {}, {})
    state, metadata = WanLoraLoaderMixin.lora_state_dict(path, return_lora_metadata=True)
    assert metadata["transformer.lora_alpha"] == ALPHA
    assert state.keys() == load_file(path).keys()


# What is refused.


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"blocks.9.ffn.0.diff": (40, 24)}, r"1 of 1 names .*blocks\.9\.ffn\.0\.diff"),
        ({"blocks.0.ffn.0.hada_w1_a": (2, 2)}, r"1 of 1 names belong to no known form of LoRA"),
        ({"blocks.0.ffn.0.dora_scale": (2, 2)}, r"supported endings: \.lora_A\.weight"),
        ({"blocks.0.ffn.0.lora_A.weight": (2, 24)}, r"ffn\.0 has down; expected down and up"),
        ({"blocks.0.ffn.0.alpha": ()}, r"ffn\.0 has alpha; expected down and up"),
        (
            {"blocks.0.ffn.0.lora_A.weight": (2, 24), "blocks.0.ffn.0.lora_B.weight": (40, 3)},
            r"matrices of shapes \(2, 24\) and \(40, 3\); expected \(rank, in\)",
        ),
        ({"blocks.0.ffn.0.diff": (80, 48)}, r"made for another model .*\(80, 48\), expected \(40"),
    ],
)
def test_mistakes(
    names: dict[str, tuple[int, ...]], message: str, base: Path, tmp_path: Path
) -> None:
    save_file({name: random(*shape) for name, shape in names.items()}, tmp_path / "l.safetensors")
    with pytest.raises(ValueError, match=message):
        merge_loras(base, [(tmp_path / "l.safetensors", 1.0)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_broken_files(base: Path, factors, tmp_path: Path) -> None:
    path = file_of("peft", factors, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="must be finite, got inf"):
        merge_loras(base, [(path, float("inf"))], tmp_path / "out")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"lora\.safetensors is truncated"):
        merge_loras(base, [(path, 1.0)], tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no weights at"):
        merge_loras(base, [(tmp_path / "none.safetensors", 1.0)], tmp_path / "out")
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.use_rslora": True})}
    save_file({}, path, metadata)
    with pytest.raises(ValueError, match="not supported: use_rslora"):
        read_lora(path, CONFIG)
    save_file({}, path)
    with pytest.raises(ValueError, match=r"nothing to merge into base .*empty"):
        merge_loras(base, [(path, 1.0)], tmp_path / "out")


def test_mistakes_in_writing(factors, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown names 'kohya'; supported: diffusers, native"):
        write_lora(tmp_path / "a", factors, 1.0, "kohya", {}, {})
    with pytest.raises(ValueError, match="there is no LoRA to write"):
        write_lora(tmp_path / "a", {}, 1.0, "native", {}, {})
