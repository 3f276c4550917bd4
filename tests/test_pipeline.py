from __future__ import annotations

import dataclasses
import json
import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tests.tiny_models import tiny_diffusers_folder

from turbodit.attention import SageSLA, SparseLinearAttention
from turbodit.checkpoints import find_model, load_transformer, save_transformer
from turbodit.pipeline import Pipeline
from turbodit.request import GenerationRequest

SMALL = {"width": 64, "height": 32, "frames": 5, "steps": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_diffusers_folder(tmp_path_factory.mktemp("models") / "tiny", "ti2v")


@pytest.fixture(scope="module")
def pipe(folder):
    return Pipeline.from_pretrained(folder, device="cpu")


@pytest.fixture
def image():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 64, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_text_to_video(pipe):
    video = pipe("a red fox", seed=3, **SMALL)
    assert video.frames.shape == (5, 32, 64, 3)
    assert (video.prompt, video.seed, video.fps) == ("a red fox", 3, 16)
    assert video.settings["steps"] == 2
    assert video.settings["model"] == pipe.model.name
    assert set(video.timings) == {"text", "denoise", "decode", "denoise_step"}
    assert pipe.peak_memory is None  # a GPU's
    again = pipe("a red fox", seed=3, **SMALL)
    np.testing.assert_array_equal(video.frames, again.frames)
    assert (video.frames != pipe("a red fox", seed=4, **SMALL).frames).any()
    assert (video.frames != pipe("a blue cat", seed=3, **SMALL).frames).any()


@pytest.mark.parametrize(("solver", "together"), [("unipc", 3), ("few-step", 2), ("few-step", 0.5)])
def test_a_video_of_a_batch_equals_the_same_seed_alone(pipe, monkeypatch, solver, together):
    """However many samples are decoded at once."""
    monkeypatch.setattr("turbodit.pipeline.DECODED_TOGETHER", together * 64 * 32)
    batch = pipe(["a cat", "a fox", "a car"], seed=5, solver=solver, **SMALL)
    assert [video.seed for video in batch] == [5, 6, 7]
    alone = pipe("a car", seed=7, solver=solver, **SMALL)
    # Sums may be taken in another order for another batch size: one step of rounding.
    difference = np.abs(batch[2].frames.astype(int) - alone.frames.astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01


def test_several_videos_of_one_prompt(pipe):
    videos = pipe("a cat", seed=5, num_videos=2, **SMALL)
    assert [video.seed for video in videos] == [5, 6]


@pytest.mark.parametrize("solver", ["euler", "few-step"])
def test_image_to_video_keeps_the_first_frame(pipe, image, solver):
    video = pipe("a cat", image=image, seed=0, solver=solver, **SMALL)
    assert "image" in video.timings
    # What the VAE makes of the image alone is what the first frame must be.
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None, :, None] / 127.5 - 1
    coded = pipe.vae.decode(pipe.vae.encode(pixels))[0, :, 0].permute(1, 2, 0)
    expected = ((coded + 1) * 127.5).round().numpy()
    np.testing.assert_allclose(video.frames[0], expected, atol=1)


def test_progress_reaches_the_end_of_every_stage(folder, image):
    calls = []
    pipe = Pipeline.from_pretrained(folder, device="cpu", progress=lambda *call: calls.append(call))
    pipe("a cat", image=image, progress=lambda *call: calls.append(call), **SMALL)
    stages = list(dict.fromkeys(stage for stage, _, _ in calls))
    assert stages == ["load", "text", "image", "denoise", "decode"]
    for stage in stages:
        counts = [done for name, done, _ in calls if name == stage]
        total = {total for name, _, total in calls if name == stage}
        assert counts == list(range(counts[-1] + 1))
        assert total == {counts[-1]}


def test_the_unconditional_pass_is_not_run_without_guidance(pipe, monkeypatch):
    network = pipe.transformers["transformer"]
    calls = []
    handle = network.register_forward_hook(lambda *_: calls.append(1))
    pipe("a cat", guidance=1, **SMALL)
    assert len(calls) == 2
    pipe("a cat", guidance=2, **SMALL)
    assert len(calls) == 2 + 4
    handle.remove()


@pytest.mark.parametrize("mode", ["model", "sequential"])
def test_offloading_changes_nothing(folder, image, mode):
    pipe = Pipeline.from_pretrained(folder, device="cpu")
    expected = pipe("a cat", image=image, seed=1, **SMALL)
    # Built by hand: from_pretrained refuses to offload where there is no GPU to keep free.
    transformers = list(pipe.transformers.values())
    (dit,) = transformers
    vae = pipe.vae.model
    parts = [pipe.text_encoder.model, vae.quant_conv, vae.post_quant_conv, dit.head, *dit.blocks]
    homes = {part: next(part.parameters()).data_ptr() for part in parts}
    moved = {}  # part -> whether its weights were copies elsewhere while it computed
    for part in parts:
        part.register_forward_hook(
            lambda part, *_: moved.update({part: next(part.parameters()).data_ptr() != homes[part]})
        )
    offloaded = Pipeline(pipe.model, transformers, pipe.vae, pipe.text_encoder, offload=mode)
    video = offloaded("a cat", image=image, seed=1, **SMALL)
    np.testing.assert_array_equal(video.frames, expected.frames)
    assert moved == dict.fromkeys(parts, True)


def test_cached_prompts_need_no_text_encoder(folder, tmp_path, monkeypatch):
    pipe = Pipeline.from_pretrained(folder, device="cpu", prompt_cache=tmp_path)
    expected = pipe("a  cat", seed=1, **SMALL)

    def forbidden(prompts):
        raise AssertionError("text encoder was run")

    encode = pipe.text_encoder.encode
    monkeypatch.setattr(pipe.text_encoder, "encode", forbidden)
    np.testing.assert_array_equal(pipe("a cat ", seed=1, **SMALL).frames, expected.frames)
    for entry in tmp_path.iterdir():
        entry.write_bytes(b"broken")
    monkeypatch.setattr(pipe.text_encoder, "encode", encode)
    with pytest.warns(UserWarning, match="damaged"):
        np.testing.assert_array_equal(pipe("a cat", seed=1, **SMALL).frames, expected.frames)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe("a cat", seed=1, **SMALL)


def test_what_is_cut_from_a_long_prompt_is_said(pipe):
    # 511 words and the end token fill the 512 places.
    with pytest.warns(UserWarning, match="last 4 characters have no effect: 'snow'"):
        pipe("a " * 511 + "snow", **SMALL)


def test_ctrl_c_leaves_a_working_pipeline(pipe):
    def interrupt(stage, done, total):
        if stage == "denoise":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe("a cat", progress=interrupt, **SMALL)
    assert pipe("a cat", **SMALL).frames.shape == (5, 32, 64, 3)


def test_values_that_are_not_finite_are_an_error(folder):
    pipe = Pipeline.from_pretrained(folder, device="cpu")
    pipe.transformers["transformer"].head.head.bias.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="float32"):
        pipe("a cat", **SMALL)


def test_resolve_is_open_to_callers(pipe):
    settings = pipe.resolve(GenerationRequest("a cat", seed=2, **SMALL))
    (video,) = pipe.generate(settings)
    assert video.seed == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda:99"}, "finds . CUDA devices"),
        ({"device": "warp"}, "supported: cpu, cuda"),
        ({"device": "meta"}, "supported: cpu, cuda"),
        ({"device": "cpu", "offload": "model"}, "needs a GPU"),
        ({"device": "cpu", "attention": "psychic"}, "supported: sdpa"),
    ],
)
def test_what_cannot_be_loaded_is_refused(folder, options, message):
    with pytest.raises(ValueError, match=message):
        Pipeline.from_pretrained(folder, **options)


def test_unknown_option(pipe):
    with pytest.raises(TypeError, match="num_frames"):
        pipe("a cat", num_frames=5)


def test_attention_settings_are_the_models_unless_given(folder, monkeypatch):
    def blocks(**given):
        pipe = Pipeline.from_pretrained(folder, device="cpu", attention="sparge", **given)
        attend = pipe.transformers["transformer"].blocks[0].self_attn.attn_op.local_attn
        return attend.keywords

    assert blocks() == {}
    small = dataclasses.replace(find_model(folder).config(()), attention_blocks=(16, 32))
    monkeypatch.setattr("turbodit.checkpoints.folder.ModelFolder.config", lambda *_: small)
    assert blocks() == {"block_q": 16, "block_k": 32}
    given = {"ratio": 0.5, "block_k": 64}
    assert blocks(attention_settings=given) == {"block_q": 16, **given}


SLA = {"attention": "sla", "attention_settings": {"ratio": 0.3, "block_q": 16, "block_k": 32}}


@pytest.fixture(scope="module")
def student(folder, tmp_path_factory):
    """The transformer as training leaves it: sparse, distilled, and saying so."""
    with pytest.warns(UserWarning, match="not trained with sparse-linear"):
        model = load_transformer(folder / "transformer", dtype=torch.float32, attention="sla")
    path = tmp_path_factory.mktemp("student") / "transformer"
    sampling = {"solver": "few-step", "steps": 3, "sigma_max": 120.0}
    save_transformer(model, path, stated=SLA | {"sampling": sampling})
    return path


def test_files_say_how_they_are_used(folder, student):
    def attention_of(**given):
        pipe = Pipeline.from_pretrained(folder, transformer=student, device="cpu", **given)
        return pipe, pipe.transformers["transformer"].blocks[1].self_attn.attn_op.local_attn

    pipe, attend = attention_of()
    assert type(attend) is SparseLinearAttention
    assert (attend.ratio, attend.block_q, attend.block_k) == (0.3, 16, 32)
    video = pipe("a cat", width=64, height=32, frames=5, seed=0)
    used = {"solver": "few-step", "steps": 3, "sigma_max": 120.0, "guidance": 1.0}
    assert used.items() <= video.settings.items()
    assert "negative_prompt" not in video.settings

    _, attend = attention_of(attention="sagesla", attention_settings={"ratio": 0.5})
    assert type(attend) is SageSLA
    assert (attend.ratio, attend.block_q, attend.block_k) == (0.5, 16, 32)
    with pytest.raises(ValueError, match="supported: attention 'sla' or 'sagesla', got 'sdpa'"):
        attention_of(attention="sdpa")


def test_a_stated_attention_has_to_run(folder, student, monkeypatch):
    monkeypatch.setattr("turbodit.pipeline.available", lambda name, device: (False, "too old"))
    monkeypatch.setattr("turbodit.pipeline.load_transformer", lambda *_, **__: pytest.fail())
    with pytest.raises(ValueError, match="attention 'sla' does not run on cpu: too old"):
        Pipeline.from_pretrained(folder, transformer=student, device="cpu")


def test_experts_that_state_other_attention_are_refused(tmp_path):
    experts = tiny_diffusers_folder(tmp_path / "experts", "t2v-a14b")
    config = experts / "transformer_2" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | SLA))
    with pytest.raises(ValueError, match=r"same attention; .*transformer states none, .*_2 sla"):
        Pipeline.from_pretrained(experts, device="cpu")


def test_a_setting_that_the_attention_does_not_have_is_refused_before_loading(folder, monkeypatch):
    monkeypatch.setattr("turbodit.pipeline.load_transformer", lambda *_, **__: pytest.fail())
    with pytest.raises(ValueError, match="attention 'sdpa' has no setting ratio"):
        Pipeline.from_pretrained(folder, device="cpu", attention_settings={"ratio": 0.5})


def test_a_text_encoder_of_another_width_is_refused(pipe):
    shape = dataclasses.replace(pipe.model.transformer, text_dim=7)
    model = dataclasses.replace(pipe.model, transformer=shape)
    width = pipe.text_encoder.dim
    with pytest.raises(ValueError, match=f"have width {width}, .* expects 7"):
        Pipeline(model, list(pipe.transformers.values()), pipe.vae, pipe.text_encoder)


def test_the_cache_knows_the_vocabulary(folder, tmp_path, monkeypatch):
    pipe = Pipeline.from_pretrained(folder, device="cpu", prompt_cache=tmp_path)
    pipe("a cat", seed=1, **SMALL)
    before = len(list(tmp_path.iterdir()))
    tokens = pipe.text_encoder.tokenizer.get_vocab()
    first, second, *_ = tokens
    other = tokens | {first: tokens[second], second: tokens[first]}
    monkeypatch.setattr(type(pipe.text_encoder.tokenizer), "get_vocab", lambda self: other)
    Pipeline.from_pretrained(folder, device="cpu", prompt_cache=tmp_path)("a cat", **SMALL)
    assert len(list(tmp_path.iterdir())) == 2 * before


def test_linear_format_that_does_not_run_is_refused_before_loading(folder, monkeypatch):
    found = SimpleNamespace(name="NVIDIA A100", major=8, minor=0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    message = r"linear layers in fp8 do not run on cuda: needs .* 8\.9, NVIDIA A100 has 8\.0"
    with pytest.raises(ValueError, match=message):
        Pipeline.from_pretrained(folder, device="cuda", linear="fp8")
    with pytest.raises(ValueError, match="unknown 8-bit format 'int4'"):
        Pipeline.from_pretrained(folder, device="cpu", linear="int4")


def test_memory_of_a_graph_counts_once(folder, monkeypatch):
    """Openly while it is recorded, and as held afterwards."""
    pipe = Pipeline.from_pretrained(folder, device="cpu")
    pipe.device = torch.device("cuda")
    graph = SimpleNamespace(memory=0)
    pipe._graphs = {"transformer": graph}
    allocated = iter([10, 50, 20, 15])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: next(allocated))
    clock = SimpleNamespace(stage=lambda name: nullcontext())
    with pipe._stage("text", clock):
        pass
    with pipe._stage("denoise", clock):
        graph.memory = 30
    with pipe._stage("decode", clock):
        pass
    assert pipe.stage_memory == {"text": 10, "denoise": 50, "decode": 50}
    with pipe._stage("denoise", clock):
        pass
    assert pipe.stage_memory["denoise"] == 45 and pipe.peak_memory == 50
