"""Every recipe is a configuration that its model can be trained with."""

from __future__ import annotations

from collections import Counter

import pytest

from turbodit.config import PRESETS, preset
from turbodit.plan import Training
from turbodit.recipes import RCM, SLA

ALL = [(method, name) for method, recipes in (("sla", SLA), ("rcm", RCM)) for name in recipes]


def config_of(method: str, name: str):
    return {"sla": SLA, "rcm": RCM}[method][name]()


def architecture(config) -> str:
    """The preset that is trained; SpriteWan's weights to start from are its teacher's."""
    return config.model.removesuffix("-teacher")


@pytest.mark.parametrize(("method", "name"), ALL)
def test_a_recipe_fits_its_model(method, name):
    config = config_of(method, name)
    model = preset(config.model)
    assert model.name == config.model and name.startswith(architecture(config))
    config.check_model(model)
    assert model.transformer.num_heads % config.context == 0
    width, height = next(iter(next(iter(model.sizes.values())).values()))
    assert model.token_count(model.frames, height, width) % config.context == 0
    gpus = config.context * (config.shard or 1) * config.replicate
    plan = Training(
        model,
        width,
        height,
        model.frames,
        method,
        gpus,
        config.context,
        batch=config.batch,
        both_experts=model.experts == 2 and config.expert is None,
    ).plan()
    assert all(plan.peak(way) > 0 for way in plan.ways)
    assert config.ema and config.prompts
    assert (config.sample_every is None) == (name == "spritewan")


def test_every_model_has_a_recipe_of_both_methods():
    assert RCM.keys() - SLA.keys() == {"Wan2.2-T2V-A14B", "Wan2.2-I2V-A14B"}, "both experts"
    assert SLA.keys() < RCM.keys()
    for recipes in (SLA, RCM):
        assert {architecture(recipe()) for recipe in recipes.values()} == set(PRESETS)


@pytest.mark.parametrize(("recipes", "together"), [(SLA, []), (RCM, [None])], ids=["sla", "rcm"])
def test_both_experts_have_one(recipes, together):
    for model in PRESETS.values():
        configs = [recipe() for recipe in recipes.values()]
        experts = [config.expert for config in configs if architecture(config) == model.name]
        apart = ["high-noise", "low-noise"]
        expected = [*together, *apart] if model.experts == 2 else [None]
        assert experts == expected, model.name


def test_no_two_recipes_write_to_one_folder():
    """A run goes on with the checkpoints that it finds."""
    folders = Counter(config_of(method, name).out for method, name in ALL)
    assert max(folders.values()) == 1, folders.most_common(4)


def test_only_the_embedded_model_brings_its_data():
    for method, name in ALL:
        data = config_of(method, name).data
        assert [source.partition(":")[0] for source in data] == (
            ["spriteworld"] if name == "spritewan" else []
        )


def test_published_numbers_of_sla():
    """TurboDiffusion's (arXiv:2512.16093)."""
    small, large = config_of("sla", "Wan2.1-T2V-1.3B"), config_of("sla", "Wan2.1-T2V-14B")
    for config in (small, large):
        assert (config.lr, config.betas, config.weight_decay) == (1e-5, (0.9, 0.999), 0.01)
        assert (config.ratio, config.p_mean, config.p_std) == (0.1, 1.5, 1.6)
        assert (config.objective, config.train, config.max_grad_norm) == ("white-box", "full", None)
        assert config.checkpointing == "block"
    assert small.batch == 4
    assert (large.accumulate, large.context) == (32, 8)


def test_published_numbers_of_rcm():
    """Those of rCM (arXiv:2510.08431)."""
    small, large = config_of("rcm", "Wan2.1-T2V-1.3B"), config_of("rcm", "Wan2.1-T2V-14B")
    for config in (small, large):
        assert (config.betas, config.weight_decay) == ((0.0, 0.999), 0.01)
        assert (config.loss_scale, config.dmd_scale, config.shift) == (100, 1, 5)
        assert (config.guidance, config.p_std, config.method) == (5, 1.6, "rcm")
    assert (small.lr, small.fake_lr, small.p_mean, small.sigma_max) == (2e-6, 4e-7, 0.7, 80)
    assert (small.student_every, small.warmup) == (5, 1000)
    assert (large.lr, large.fake_lr, large.p_mean, large.sigma_max) == (1e-6, 1e-7, 1.5, 200)
    assert (large.student_every, large.warmup, large.context) == (10, 0, 8)
