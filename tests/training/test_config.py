"""What a training configuration refuses, and what it works out."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from turbodit.config import preset
from turbodit.training.config import MAX_EMA, RCMConfig, SLAConfig


@pytest.mark.parametrize("name", ["steps", "batch", "accumulate", "log_every", "save_every"])
@pytest.mark.parametrize("kind", [SLAConfig, RCMConfig])
def test_counts_are_positive(kind, name):
    with pytest.raises(ValueError, match=f"{name} must be positive, got 0"):
        kind(model="spritewan", **{name: 0})


@pytest.mark.parametrize(
    ("kind", "wrong", "message"),
    [
        (SLAConfig, {"sample_every": 0}, "sample_every must be positive, got 0"),
        (SLAConfig, {"lr": 0.0}, "lr must be positive, got 0"),
        (SLAConfig, {"lr": float("nan")}, "lr must be positive, got nan"),
        (SLAConfig, {"max_grad_norm": -1.0}, "max_grad_norm must be positive, got -1"),
        (SLAConfig, {"lr": float("inf")}, "lr must be finite, got inf"),
        (SLAConfig, {"image_share": 1.5}, r"image_share must be in \[0, 1\], got 1.5"),
        (SLAConfig, {"keep": 0}, "keep must be positive, got 0"),
        (SLAConfig, {"shard": 0}, "shard must be positive, got 0"),
        (SLAConfig, {"seed": -1}, "seed must be 0 or more, got -1"),
        (SLAConfig, {"weight_decay": -0.1}, "weight_decay must be 0 or more, got -0.1"),
        (SLAConfig, {"weight_decay": float("nan")}, "weight_decay must be 0 or more, got nan"),
        (SLAConfig, {"betas": (0.9, 1.0)}, r"betas must be in \[0, 1\), got \(0.9, 1.0\)"),
        (SLAConfig, {"betas": (float("nan"), 0.9)}, r"betas must be in \[0, 1\), got \(nan"),
        (SLAConfig, {"ema": (0.1, 0.5)}, r"ema must be .* between 0 and 0.2887, got \(0.1, 0.5\)"),
        (SLAConfig, {"ema": (0.0,)}, "ema must be .* between 0 and 0.2887, got"),
        (SLAConfig, {"ema": (0.1, 0.1)}, "ema must be different values"),
        (SLAConfig, {"ratio": 1.5}, r"ratio must be in \(0, 1\], got 1.5"),
        (SLAConfig, {"ratio": float("nan")}, "ratio must be finite, got nan"),
        (SLAConfig, {"first_ratio": 0.0}, r"first_ratio must be in \(0, 1\], got 0"),
        (SLAConfig, {"ratio_steps": -1}, "ratio_steps must be 0 or more, got -1"),
        (SLAConfig, {"p_mean": float("nan")}, "p_mean must be finite, got nan"),
        (SLAConfig, {"p_std": 0.0}, "p_std must be positive, got 0"),
        (SLAConfig, {"block_k": 0}, "block_k must be positive, got 0"),
        (SLAConfig, {"train": "lora", "lora_rank": 0}, "lora_rank must be positive, got 0"),
        (SLAConfig, {"lora_rank": 8}, "lora_rank is that of train lora, got 8 with train full"),
        (RCMConfig, {"p_std": -1.0}, "p_std must be positive, got -1"),
        (RCMConfig, {"shift": 0.0}, "shift must be positive, got 0"),
        (RCMConfig, {"joint_ratio": 1.01}, r"joint_ratio must be in \(0, 1\], got 1.01"),
        (RCMConfig, {"fake_lr": 0.0}, "fake_lr must be positive, got 0"),
        (RCMConfig, {"sigma_max": float("inf")}, "sigma_max must be finite, got inf"),
        (RCMConfig, {"guidance": float("nan")}, "guidance must be finite, got nan"),
        (RCMConfig, {"warmup": -1}, "warmup must be 0 or more, got -1"),
        (RCMConfig, {"method": "scm", "fixed_times": True}, "methods rcm and dmd, got method scm"),
        (RCMConfig, {"method": "dcm", "tangent": "semi-continuous"}, "continuous with method dcm"),
        (RCMConfig, {"method": "dmd", "tangent": "finite-difference"}, "methods rcm and scm, got"),
        (RCMConfig, {"student_every": 0}, "student_every must be positive, got 0"),
        (RCMConfig, {"rollout_steps": 0}, "rollout_steps must be from 1 to 4, got 0"),
        (RCMConfig, {"rollout_steps": 5}, "rollout_steps must be from 1 to 4, got 5"),
    ],
)
def test_values_that_cannot_be(kind, wrong, message):
    with pytest.raises(ValueError, match=message):
        kind(model="spritewan", **wrong)


def test_the_averages_limit_is_their_own():
    from turbodit.training.ema import MAX_RATE

    assert MAX_EMA == MAX_RATE
    SLAConfig(model="", ema=(0.288,))


def test_unknown_names_and_later_changes_are_errors():
    with pytest.raises(TypeError, match="learning_rate"):
        SLAConfig(model="spritewan", learning_rate=1e-5)
    with pytest.raises(FrozenInstanceError):
        SLAConfig(model="spritewan").lr = 1.0


def test_the_expert_is_named_for_two_expert_models_alone():
    two, one = preset("Wan2.2-T2V-A14B"), preset("Wan2.1-T2V-1.3B")
    SLAConfig(model="", expert="low-noise").check_model(two)
    SLAConfig(model="").check_model(one)
    with pytest.raises(ValueError, match=r"expert is None; Wan2\.2.*high-noise or low-noise"):
        SLAConfig(model="").check_model(two)
    with pytest.raises(ValueError, match=r"expert is high-noise; Wan2\.1.* wants none"):
        SLAConfig(model="", expert="high-noise").check_model(one)


@pytest.mark.parametrize("method", ["rcm", "dmd", "dcm"])
def test_one_expert_of_two_cannot_roll_out(method):
    two = preset("Wan2.2-T2V-A14B")
    RCMConfig(model="", expert="high-noise", method="scm").check_model(two)
    with pytest.raises(ValueError, match=f"one expert trains with method scm, got {method}"):
        RCMConfig(model="", expert="high-noise", method=method).check_model(two)


@pytest.mark.parametrize("values", [{}, {"method": "scm"}, {"method": "dmd"}])
def test_two_experts_are_distilled_in_one_run(values):
    RCMConfig(model="", **values).check_model(preset("Wan2.2-I2V-A14B"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "dcm"}, "over the boundary.*got dcm with exact"),
        ({"tangent": "semi-continuous"}, "over the boundary.*got rcm with semi-continuous"),
        ({"student": Path("a")}, "begin with the model's own weights, got student a"),
        ({"transformer": Path("b")}, "begin with the model's own weights, got transformer b"),
    ],
)
def test_what_both_experts_in_one_run_cannot_do(values, message):
    with pytest.raises(ValueError, match=message):
        RCMConfig(model="", **values).check_model(preset("Wan2.2-T2V-A14B"))
    RCMConfig(model="", **values).check_model(preset("Wan2.1-T2V-1.3B"))


def test_the_ratio_falls_in_a_straight_line():
    config = SLAConfig(model="", ratio=0.1, first_ratio=0.5, ratio_steps=4)
    assert [config.ratio_at(n) for n in range(6)] == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1, 0.1])
    assert SLAConfig(model="", ratio=0.3).ratio_at(0) == 0.3
    at_once = SLAConfig(model="", ratio=0.1, first_ratio=0.5, ratio_steps=0)
    assert at_once.ratio_at(0) == 0.1


def test_attention_blocks_are_the_models_own_unless_asked_for():
    sprite, wan = preset("spritewan"), preset("Wan2.1-T2V-1.3B")
    config = SLAConfig(model="", variant="paper", ratio=0.2)
    assert config.attention_settings(wan) == {"ratio": 0.2, "variant": "paper"}
    settings = config.attention_settings(sprite)
    assert (settings["block_q"], settings["block_k"]) == (16, 16)
    asked = SLAConfig(model="", block_q=32)
    assert asked.attention_settings(wan)["block_q"] == 32
    settings = asked.attention_settings(sprite)
    assert (settings["block_q"], settings["block_k"]) == (32, 16)


def turns(steps: int, **values) -> str:
    """Of the updates: s and S the student's without and with DMD, f the fake score's."""
    config = RCMConfig(model="", student_every=3, warmup=4, **values)
    return "".join(
        ("S" if config.dmd_counts(n) else "s") if config.updates_student(n) else "f"
        for n in range(steps)
    )


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("rcm", "ssssffSffSff"),
        ("dmd", "SffSffSffSff"),
        ("scm", "ssssssssssss"),
        ("dcm", "ssssssssssss"),
    ],
)
def test_student_and_fake_score_take_turns(method, expected):
    assert turns(12, method=method) == expected


def test_without_warm_up_the_student_is_first():
    config = RCMConfig(model="", warmup=0, student_every=10)
    assert [n for n in range(25) if config.updates_student(n)] == [0, 10, 20]
    assert config.dmd_counts(0)
    assert config.tangent_weight(0) == 1.0


def test_the_tangent_warms_up_to_one_and_stays():
    config = RCMConfig(model="", warmup=4)
    assert [config.tangent_weight(n) for n in range(6)] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]


def test_rcms_own_defaults():
    """Not those of all methods: its AdamW has no momentum, its rate is a fifth of SLA's."""
    config = RCMConfig(model="")
    assert (config.betas, config.lr) == ((0.0, 0.999), 2e-6)
    assert config.out == Path("runs")
