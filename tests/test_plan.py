"""The calculator: against models, against what autograd keeps, and against measured steps."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
import tyro
from tyro.conf import FlagCreatePairsOff

from turbodit.cli.plan import PlanCommand
from turbodit.config import TransformerConfig, preset
from turbodit.model.wan import Context, WanModel
from turbodit.plan import CARDS, RESERVE, Inference, Training
from turbodit.plan.inference import DECODE, DENOISE, OFFLOADED, RESIDENT
from turbodit.plan.report import GIB
from turbodit.plan.training import KEPT_D, KEPT_F
from turbodit.plan.weights import CLIP, TEXT_ENCODERS, VAES, count, trained_parameters
from turbodit.quantization import linear_format, replace_linears
from turbodit.training.parameters import LoRA, select_trainable

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
MEASURED = "wan2.1-t2v-1.3b-832x480x81"
SMALL, LARGE = "Wan2.1-T2V-1.3B", "Wan2.1-T2V-14B"
MODES: dict[str, dict[str, Any]] = {  # of `turbodit bench step`
    "dense": {"residual": "float32"},
    "bf16-residual": {},
    "fp8": {"linear": "fp8"},
    "int8-channel": {"linear": "int8-channel"},
    "int8-block": {"linear": "int8-block"},
    "sagesla": {"attention": "sagesla"},
    "sagesla-fp8": {"linear": "fp8", "attention": "sagesla"},
    "sagesla-int8-channel": {"linear": "int8-channel", "attention": "sagesla"},
    "sagesla-int8-block": {"linear": "int8-block", "attention": "sagesla"},
}


# Weights.


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        (SMALL, "sdpa"),
        (SMALL, "sla"),
        ("Wan2.1-FLF2V-14B-720P", "sla"),
        ("Wan2.2-I2V-A14B", "sdpa"),
        ("Wan2.2-TI2V-5B", "sla"),
        ("spritewan", "sla"),
    ],
)
def test_weights(name: str, attention: str) -> None:
    """Every parameter of the real model, and its bytes."""
    config = preset(name).transformer
    with torch.device("meta"):
        model = WanModel(config, attention)
    counts = count(config, attention == "sla")
    assert counts.total == sum(p.numel() for p in model.parameters())
    kept = {n for n, _ in model.named_parameters() if model.keep_float32(n)}
    assert counts.bytes() == sum(
        p.numel() * (4 if n in kept else 2) for n, p in model.named_parameters()
    )


@pytest.mark.parametrize("linear", ["int8-block", "fp8"])
@pytest.mark.parametrize("name", [SMALL, "Wan2.1-I2V-14B-480P"])
def test_8_bit_weights(linear: str, name: str) -> None:
    config = preset(name).transformer
    with torch.device("meta"):
        model = WanModel(config)
    replace_linears(model, linear_format(linear))

    def size(name: str, tensor: torch.Tensor) -> int:
        if tensor.dtype.itemsize == 1:
            return tensor.numel()
        wide = model.keep_float32(name) or name.endswith(".scale")
        return tensor.numel() * (4 if wide else 2)

    expected = sum(size(name, tensor) for name, tensor in model.state_dict().items())
    assert count(config, False).bytes(linear) == expected


def test_other_networks() -> None:
    from diffusers import AutoencoderKLWan

    from turbodit.checkpoints import find_model
    from turbodit.config import VAE_21, VAE_22, VAE_SPRITE
    from turbodit.random_models import SHAPE_22

    sprite = AutoencoderKLWan.load_config(find_model("spritewan").vae)
    with torch.device("meta"):
        for vae, shape in ((VAE_21, {}), (VAE_22, SHAPE_22), (VAE_SPRITE, sprite)):
            model = AutoencoderKLWan.from_config(shape)
            assert VAES[vae] == sum(p.numel() for p in model.parameters())
    # umT5-xxl: 24 layers with a table of 32 relative positions for 64 heads each; CLIP ViT-H/14.
    layer = 4 * 4096**2 + 3 * 4096 * 10240 + 2 * 4096 + 32 * 64
    assert TEXT_ENCODERS[4096] == 256_384 * 4096 + 24 * layer + 4096
    layer = 4 * (1280**2 + 1280) + 2 * 1280 * 5120 + 5120 + 1280 + 4 * 1280
    assert 32 * layer + 1280 * (3 * 14**2 + 1 + 257 + 4) == CLIP


@pytest.mark.parametrize("sla", [True, False])
def test_what_trains(sla: bool) -> None:
    config = TransformerConfig(
        dim=24, ffn_dim=40, num_heads=2, num_layers=2, text_dim=32, freq_dim=32
    )
    parts = {"full": "full", "attention": "attention", "lora": LoRA(rank=3)}
    for name, part in (parts | ({"proj_l": "proj_l"} if sla else {})).items():
        model = WanModel(config, "sla" if sla else "sdpa")
        trained = select_trainable(model, part)
        expected = sum(p.numel() for p in trained.values())
        assert trained_parameters(config, name, sla, 3) == expected, name
    if not sla:
        with pytest.raises(ValueError, match="only proj_l is to train"):
            trained_parameters(config, "proj_l", False, 3)


# Measured steps and videos.


def result(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"2026-11-26-nvidia-h100-80gb-hbm3-{name}.json").read_text())


@pytest.mark.parametrize(
    "name",
    [
        "wan2.1-t2v-1.3b-832x480x81",
        "wan2.1-t2v-14b-832x480x81",
        "wan2.1-t2v-14b-1280x720x81",
        "wan2.2-ti2v-5b-1280x704x121",
    ],
)
def test_steps_that_were_measured(name: str) -> None:
    numbers = result(f"step-{name}")
    size = (numbers["width"], numbers["height"], numbers["frames"])
    rows = {mode: row for mode, row in numbers["modes"].items() if mode in MODES}
    assert "sagesla-fp8" in rows
    for mode, row in rows.items():
        options = {"residual": "bfloat16"} | MODES[mode]
        job = Inference(preset(numbers["model"]), *size, **options)
        called = sum(replace(job, graph=False).step().values()) / GIB
        assert called == pytest.approx(row["peak_gib"], rel=0.07), mode
        if "graph_peak_gib" in row:
            recorded = sum(job.step().values()) / GIB
            assert recorded == pytest.approx(row["graph_peak_gib"], rel=0.07), mode
        seconds = row.get("graph_ms", row["eager_ms"])["median"] / 1000
        assert job.seconds() == pytest.approx(seconds, rel=0.06), mode


@pytest.mark.parametrize("name", ["wan2.1-t2v-1.3b-832x480x81", "wan2.2-t2v-a14b-1280x720x81"])
def test_videos_that_were_measured(name: str) -> None:
    """Both stages, of one expert and of two; without text encoders, whose place was empty."""
    numbers = result(f"e2e-{name}")
    size = (numbers["width"], numbers["height"], numbers["frames"])
    job = Inference(preset(numbers["model"]), *size, "sagesla", "fp8", "bfloat16")
    stages = job.plan().stages
    for stage, name in ((DENOISE, "denoise"), (DECODE, "decode")):
        taken = sum(size for part, size in stages[stage].items() if part != "encoders")
        assert taken / GIB == pytest.approx(numbers["peak_gib"][name], rel=0.05), name


# Training.


@pytest.mark.parametrize("attention", ["sla", "sdpa"])
def test_what_autograd_keeps(attention: str) -> None:
    """Bytes of a block's saved tensors, without its parameters."""
    d, f, length = 256, 768, 512
    config = TransformerConfig(
        dim=d, ffn_dim=f, num_heads=2, num_layers=1, text_dim=32, text_len=8, freq_dim=32
    )
    model = WanModel(config, attention)
    for name, parameter in model.named_parameters():
        if not model.keep_float32(name):
            parameter.data = parameter.data.bfloat16()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # alive, so that no address returns
        return tensor

    x = torch.randn(1, length, d, requires_grad=True)
    angles = model.angles(torch.zeros(1, 16, 2, 32, 32))
    context = Context(torch.randn(1, 8, d, dtype=torch.bfloat16), None)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.blocks[0](x, torch.randn(1, 1, 6, d), angles, context, torch.bfloat16, 2)
    size = sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in own)
    assert size == pytest.approx(length * (KEPT_D * d + KEPT_F * f), rel=0.15)


def test_training_by_hand() -> None:
    """The 1.3B model on one GPU, whole in bfloat16: 2 + 2 + 4 + 4 bytes and a teacher's 2.

    With master weights 4 + 4 + 8 + 4.
    """
    job = Training(preset(SMALL), 832, 480, 81, "sla", master_weights=False)
    parts = job.parts()
    weights = count(preset(SMALL).transformer, True).total
    for name, size in {"weights": 4, "gradients": 4, "AdamW": 8, "EMA": 4}.items():
        assert replace(job, master_weights=True).parts()[f"student: {name}"] == size * weights
    sizes = {"weights": 2, "gradients": 2, "AdamW": 4, "EMA": 4}
    for name, size in sizes.items():
        assert parts[f"student: {name}"] == pytest.approx(size * weights, rel=0.03)
    assert parts["teacher: weights"] == pytest.approx(2 * weights, rel=0.03)
    assert parts["gathered weights"] == 0
    assert parts["kept activations"] == 32_760 * 1536 * (30 * 4 + 16)
    assert not any("fake" in part for part in parts)


def test_averages_are_float32_copies_of_what_trains() -> None:
    job = Training(preset(SMALL), 832, 480, 81, "sla")
    one = job.parts()["student: EMA"]
    assert one == 4 * count(preset(SMALL).transformer, True).total
    for number in (0, 2):
        parts = replace(job, averages=number).parts()
        assert parts == job.parts() | {"student: EMA": number * one}


def test_the_networks_that_a_method_has() -> None:
    """Without a teacher, a fake score or both; the rest is the same."""
    sla = Training(preset(SMALL), 832, 480, 81, "sla")
    with_teacher = sla.parts()
    del with_teacher["teacher: weights"]
    assert replace(sla, objective="black-box").parts() == with_teacher
    parts = {method: replace(sla, method=method).parts() for method in ("rcm", "dmd", "scm", "dcm")}
    assert parts["rcm"] == parts["dmd"]
    alone = {part: n for part, n in parts["rcm"].items() if not part.startswith("fake score")}
    assert len(parts["rcm"]) - len(alone) == 3
    assert parts["scm"] == parts["dcm"] == alone


def test_seconds_of_methods() -> None:
    """The passes that an update has, counted by hand; all are dense ones."""
    sla = Training(preset(SMALL), 832, 480, 81, "sla", attention="sdpa")
    teacher = replace(sla, objective="black-box").seconds()["an update on H100s"]
    dense = sla.seconds()["an update on H100s"] - teacher
    assert teacher == pytest.approx(4.5 * dense)  # itself, computed again, backward
    counts = {"scm": 2 + 2.5 + 4.5, "dcm": 2 + 1 + 4.5}
    for method, passes in counts.items():
        seconds = replace(sla, method=method).seconds()
        assert seconds == {"an update on H100s": pytest.approx(passes * dense)}
    matching, fake = 1.5 + 4.5 + 3, 2.5 + 4.5
    student, score, mean = replace(sla, method="dmd").seconds().values()
    assert (student, score) == (pytest.approx(matching * dense), pytest.approx(fake * dense))
    assert mean == pytest.approx((matching + 4 * fake) / 5 * dense)
    student, *_ = replace(sla, method="rcm").seconds().values()
    assert student == pytest.approx((counts["scm"] + matching) * dense)
    changed = replace(sla, method="rcm", student_every=2, rollout_steps=1)
    student, score, mean = changed.seconds().values()
    assert student == pytest.approx((counts["scm"] + matching - 1.5) * dense)
    assert score == pytest.approx((fake - 1.5) * dense)
    assert mean == pytest.approx((student + score) / 2)


def test_large_models_update_the_student_less_often() -> None:
    student, score, mean = Training(preset(LARGE), 832, 480, 81, "rcm").seconds().values()
    assert mean == pytest.approx((student + 9 * score) / 10)


def test_training_that_was_measured() -> None:
    """Tens of percent off, and NOTES say what is reckoned."""
    rows = {row["what"]: row for row in result(f"training-step-{MEASURED}")["rows"]}
    sla = Training(preset(SMALL), 832, 480, 81, "sla", averages=0)
    rcm = replace(sla, method="rcm", rollout_steps=3)  # two steps on average
    update = sla.seconds()["an update on H100s"]
    student, fake, _ = rcm.seconds().values()
    measured = {name: median(row["s"]) for name, row in rows.items()}
    for seconds, parts in (
        (update, ("SLA, white-box",)),
        (student, ("rCM: sCM", "rCM: DMD")),
        (fake, ("rCM: fake score",)),
    ):
        assert seconds == pytest.approx(sum(measured[part] for part in parts), rel=0.35), parts
    for job, part in ((sla, "SLA, white-box"), (rcm, "rCM: fake score")):
        assert gib(job) == pytest.approx(rows[part]["peak_gib"], rel=0.35), part
    notes = " ".join(sla.plan().notes)
    for text in (
        f"({update:.2f} reckoned",
        f"GiB ({gib(sla):.1f})",
        f"s ({student:.1f})",
        f"s ({fake:.1f})",
        f"GiB ({gib(rcm):.1f})",
    ):
        assert text in notes, text


def gib(job: Training) -> float:
    return sum(job.parts().values()) / GIB


def test_training_on_several_gpus() -> None:
    bfloat16 = {"master_weights": False}
    job = Training(preset(LARGE), 832, 480, 81, "rcm", gpus=8, context_parallel=2, **bfloat16)
    one = Training(preset(LARGE), 832, 480, 81, "rcm", **bfloat16)
    parts, whole = job.parts(), one.parts()
    for part, size in whole.items():
        if ":" in part:
            assert parts[part] == -(-size // 8), part
    assert parts["kept activations"] * 2 == whole["kept activations"]
    assert parts["gathered weights"] > 0
    replicated = replace(job, fsdp=4).parts()
    assert replicated["student: AdamW"] == pytest.approx(2 * parts["student: AdamW"])
    assert replace(job, batch=2).parts()["kept activations"] == whole["kept activations"]
    assert all(a == pytest.approx(b / 2) for a, b in
               zip(job.seconds().values(), one.seconds().values(), strict=True))  # fmt: skip
    assert not any(one.plan().fits("one GPU").values())


def test_both_experts_take_what_two_do_but_for_activations() -> None:
    one = Training(preset("Wan2.2-T2V-A14B"), 832, 480, 81, "rcm", gpus=8, context_parallel=4)
    both = replace(one, both_experts=True)
    parts, single = both.parts(), one.parts()
    assert parts.keys() == single.keys()
    for part, size in parts.items():
        assert size == pytest.approx(single[part] * (2 if ":" in part else 1), abs=1), part
    assert both.seconds() == one.seconds()
    assert one.plan().title.endswith("one expert") and both.plan().title.endswith("both experts")
    for changes in ({"model": preset(SMALL)}, {"method": "sla"}, {"method": "dcm"}):
        with pytest.raises(ValueError, match="by rcm, scm and dmd, of a model that has two; got"):
            replace(both, **changes)


def test_what_saves_memory_in_training() -> None:
    full = Training(preset(SMALL), 832, 480, 81, "sla", master_weights=False)

    def peak(**options: Any) -> int:
        return sum(replace(full, **options).parts().values())

    ordered = [
        peak(master_weights=True, checkpointing="none"),
        peak(checkpointing="none"),
        peak(checkpointing="selective"),
        peak(),
        peak(part="attention"),
        peak(part="lora"),
        peak(part="proj_l"),
    ]
    assert ordered == sorted(ordered, reverse=True) and len(set(ordered)) == len(ordered)
    # Weights, gradients, two moments; the EMA is float32 in any case.
    weights = count(preset(SMALL).transformer, True).total
    more = peak(master_weights=True) - peak()
    gathered = replace(full, master_weights=True).parts()["gathered weights"]
    assert more - gathered == pytest.approx(4 * 2 * weights, rel=0.03)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpus": 0}, "gpus must be positive, got 0"),
        ({"gpus": 8, "fsdp": 3}, "8 GPUs with 3 for a copy"),
        ({"gpus": 8, "context_parallel": 3}, "8 GPUs with 8 for a copy .* and 3 for"),
        ({"gpus": 8, "context_parallel": 8}, "12 heads and 32,760 tokens do not divide over 8"),
        ({"method": "sft"}, "unknown method 'sft'; supported: sla, rcm, scm, dmd, dcm"),
        ({"objective": "grey"}, "unknown objective 'grey'; supported: white-box, black-box"),
        ({"method": "scm", "objective": "black-box"}, "scm is not black-box"),
        ({"averages": -1}, "averages must be 0 or more, got -1"),
        ({"student_every": 0}, "student_every must be positive, got 0"),
        ({"ratio": 1.5}, r"ratio must be in \(0, 1\], got 1.5"),
        ({"part": "head"}, "unknown part 'head'; supported: full, attention, proj_l, lora"),
        ({"checkpointing": "all"}, "unknown checkpointing 'all'; supported: none, selective"),
        ({"attention": "flash3"}, "the cost of attention 'flash3' is not known; known: sdpa"),
        ({"frames": 80}, r"frames must be 4k\+1, got 80"),
        ({"width": 831}, "831"),
    ],
)
def test_mistakes_in_training(options: dict[str, Any], message: str) -> None:
    job = {"model": preset(SMALL), "width": 832, "height": 480, "frames": 81, "method": "sla"}
    with pytest.raises(ValueError, match=message):
        Training(**job | options)


# What is said.


def test_cards() -> None:
    plan = Inference(preset("Wan2.2-T2V-A14B"), 1280, 720, 81, "sagesla", "fp8").plan()
    stages = {stage: sum(parts.values()) for stage, parts in plan.stages.items()}
    assert plan.peak(RESIDENT) == max(stages[DENOISE], stages[DECODE])
    assert stages[DENOISE] > 2 * count(preset(LARGE).transformer, True).bytes("fp8")
    for way in (RESIDENT, OFFLOADED):
        for card, fits in plan.fits(way).items():
            assert fits == (plan.peak(way) + RESERVE <= CARDS[card] * GIB)
    assert plan.peak(OFFLOADED) < plan.peak(RESIDENT)
    called = Inference(preset("Wan2.2-T2V-A14B"), 1280, 720, 81, "sagesla", "fp8", graph=False)
    activations = called.plan().stages[DENOISE]["activations"]
    assert activations == called.activations()  # once, whatever the number of experts
    with_clip = Inference(preset("Wan2.1-I2V-14B-480P"), 832, 480, 81).plan()
    assert with_clip.stages[DENOISE]["encoders"] == 2 * (TEXT_ENCODERS[4096] + CLIP)
    other = Inference(preset("Wan2.2-TI2V-5B"), 1280, 704, 121).plan()
    assert DECODE not in other.stages and "not been measured" in " ".join(other.notes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "none"}, "the cost of attention 'none' is not known"),
        ({"linear": "int4"}, "unknown 8-bit format 'int4'; supported: int8-block"),
        ({"ratio": 0.0}, r"must be in \(0, 1\], got 0"),
        ({"height": 481}, "481"),
    ],
)
def test_mistakes_in_inference(options: dict[str, Any], message: str) -> None:
    job = {"model": preset(SMALL), "width": 832, "height": 480, "frames": 81}
    with pytest.raises(ValueError, match=message):
        Inference(**job | options)


def plan(*arguments: str) -> None:
    tyro.cli(PlanCommand, args=arguments, config=(FlagCreatePairsOff,)).run()


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    plan("--model", LARGE, "--size", "1280x720", "--linear", "fp8", "--attention", "sagesla")
    out = capsys.readouterr().out
    for text in ("75,600 tokens", "CUDA graph", "VAE", "141 GB", "fits", "on an H100: 2.52 s"):
        assert text in out
    plan("--train", "rcm", "--gpus", "8", "--context-parallel", "2", "--json")
    result = json.loads(capsys.readouterr().out)
    assert "fake score: AdamW" in result["bytes"]["one of 8 GPUs"]
    assert result["fits"]["one of 8 GPUs"]["141 GB"] and result["seconds"]
    assert any("Estimates" in note for note in result["notes"])
    plan(
        "--train", "rcm", "--gpus", "8", "--context-parallel", "2", "--json", "--no-master-weights"
    )
    half = json.loads(capsys.readouterr().out)["bytes"]["one of 8 GPUs"]
    name = "fake score: AdamW"  # float32, but for what Wan keeps so in any case
    assert result["bytes"]["one of 8 GPUs"][name] == pytest.approx(2 * half[name], rel=0.03)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpus", "8"), "--gpus: such flags need --train"),
        (("--no-master-weights",), "--no-master-weights: such flags need --train"),
        (("--train", "sla", "--linear", "fp8"), "--linear: such flags go without --train"),
        (("--train", "sla", "--rank", "8"), "it needs --part lora"),
        (("--ratio", "0.2"), "--ratio is that of sparse attention"),
        (("--model", "none"), "unknown model 'none'"),
        (("--size", "big"), "size must be"),
    ],
)
def test_mistakes_in_commands(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(*arguments)


def test_no_torch() -> None:
    code = (
        "import sys\nfrom turbodit.cli.plan import PlanCommand\n"
        "PlanCommand(train='rcm').run()\nPlanCommand().run()\nassert 'torch' not in sys.modules\n"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
