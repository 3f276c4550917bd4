"""`turbodit train`: a recipe, changed by flags, and run.

The recipe gives every flag its default, so it is looked up before the flags are read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from rich.console import Console
from rich.table import Table
from tyro.conf import arg, subcommand

from turbodit.cli.generate import Switch
from turbodit.recipes import RCM, SLA
from turbodit.training.config import RCMConfig, SLAConfig, TrainConfig

if TYPE_CHECKING:
    from turbodit.config import ModelConfig
    from turbodit.plan import Plan

DEFAULT_RECIPE = "spritewan"
SPRITEWORLD = "spriteworld:"  # before a number of clips

Config = TypeVar("Config", bound=TrainConfig)


def _recipe_flag(recipes: Collection[str]) -> Any:
    supported = ", ".join(recipes)
    return arg(metavar="NAME", help=f"What the other flags' defaults are, by model: {supported}.")


@dataclass(frozen=True)
class TrainSLA:
    """Fine-tune a model for sparse-linear attention (SLA).

    Started again, the same command goes on where it was. torchrun spreads it over several GPUs.
    """

    config: SLAConfig
    recipe: Annotated[str, _recipe_flag(SLA)] = DEFAULT_RECIPE
    dry_run: Switch = False
    """Show the configuration and what it takes of memory; train nothing."""
    debug: Switch = False
    """Show the traceback of errors."""

    def run(self) -> None:
        """Train, or show what would be."""
        if self.dry_run:
            show(self.config)
            return
        from turbodit.training.sla import train

        train(with_data(self.config))


@dataclass(frozen=True)
class TrainRCM:
    """Distil a model into one that needs one to four steps and no guidance (rCM).

    Started again, the same command goes on where it was. torchrun spreads it over several GPUs.
    """

    config: RCMConfig
    recipe: Annotated[str, _recipe_flag(RCM)] = DEFAULT_RECIPE
    dry_run: Switch = False
    """Show the configuration and what it takes of memory; train nothing."""
    debug: Switch = False
    """Show the traceback of errors."""

    def run(self) -> None:
        """Train, or show what would be."""
        if self.dry_run:
            show(self.config)
            return
        from turbodit.training.rcm import train

        train(with_data(self.config))


def train_command(arguments: Sequence[str]) -> Any:
    """The commands, with the defaults of the recipe that `arguments` name.

    Raises:
        ValueError: an unknown recipe.
    """
    sla_name, rcm_name = _recipe("sla", SLA, arguments), _recipe("rcm", RCM, arguments)
    sla = TrainSLA(SLA[sla_name](), sla_name)
    rcm = TrainRCM(RCM[rcm_name](), rcm_name)
    return Annotated[
        Annotated[TrainSLA, subcommand("sla", default=sla)]
        | Annotated[TrainRCM, subcommand("rcm", default=rcm)],
        subcommand("train", description="Train a model: sparse attention (sla), few steps (rcm)."),
    ]


def with_data(config: Config) -> Config:
    """`config` with the embedded model's own data, "spriteworld:N", written to the run's folder."""
    sources = []
    for source in config.data:
        if source.startswith(SPRITEWORLD):
            source = str(_sprite_data(config, source.removeprefix(SPRITEWORLD)))
        sources.append(source)
    return replace(config, data=tuple(sources))


def _sprite_data(config: TrainConfig, number: str) -> Path:
    """The folder of so many clips, which the first process makes while the others wait."""
    import torch.distributed as dist

    from turbodit.device import choose_device
    from turbodit.distributed import join
    from turbodit.spritewan.shards import write_clips

    if not number.isdecimal():
        raise ValueError(f"{SPRITEWORLD}N takes a number of clips, got {number!r}")
    folder = config.out / f"data-{number}"
    mesh = join(
        choose_device(config.device),
        replicate=config.replicate,
        shard=config.shard,
        context=config.context,
    )
    if mesh.is_first:
        write_clips(folder, int(number), config.device)
    dist.barrier()
    return folder


def show(config: SLAConfig | RCMConfig) -> None:
    """Print the configuration and, of a model that has a name, the plan of its memory.

    Of the processes that torchrun started the first one prints.

    Raises:
        ValueError: a configuration that the model cannot be trained with.
    """
    from turbodit.cli.plan import show as show_plan
    from turbodit.config import preset

    try:
        model = preset(config.model)
    except ValueError:
        model = None
    if model is not None:
        config.check_model(model)
    if os.environ.get("RANK", "0") != "0":  # torchrun's
        return
    table = Table("flag", "value")
    for name, value in asdict(config).items():
        table.add_row(name.replace("_", "-"), json.dumps(value, default=str, ensure_ascii=False))
    Console().print(table)
    if model is None:
        print(f"no plan of memory: {config.model} is none of the models with a name")
        return
    show_plan(_plan(config, model))


def _plan(config: SLAConfig | RCMConfig, model: ModelConfig) -> Plan:
    from turbodit.plan import Training

    width, height = next(iter(next(iter(model.sizes.values())).values()))
    shards = (config.shard or 1) * config.context
    return Training(
        model,
        width,
        height,
        model.frames,
        gpus=shards * config.replicate,
        context_parallel=config.context,
        fsdp=shards,
        batch=config.batch,
        checkpointing=config.checkpointing,
        master_weights=config.master_weights,
        both_experts=model.experts == 2 and config.expert is None,
        averages=len(config.ema),
        **(_of_sla(config) if isinstance(config, SLAConfig) else _of_rcm(config)),
    ).plan()


def _of_sla(config: SLAConfig) -> dict[str, Any]:
    """What the plan needs to know of this method alone."""
    return {
        "method": "sla",
        "objective": config.objective,
        "part": config.train,
        "rank": config.lora_rank,
        "ratio": config.ratio,
    }


def _of_rcm(config: RCMConfig) -> dict[str, Any]:
    """What the plan needs to know of this method alone."""
    joint = {} if config.joint_ratio is None else {"attention": "sla", "ratio": config.joint_ratio}
    turns = {"student_every": config.student_every, "rollout_steps": config.rollout_steps}
    return {"method": config.method, **turns, **joint}


def _recipe(method: str, recipes: Collection[str], arguments: Sequence[str]) -> str:
    """The recipe's name, if it is this method that is to be run."""
    if list(arguments[:2]) != ["train", method]:
        return DEFAULT_RECIPE
    name = _recipe_in(arguments)
    if name not in recipes:
        raise ValueError(f"unknown recipe {name!r}; supported: {', '.join(recipes)}")
    return name


def _recipe_in(arguments: Sequence[str]) -> str:
    for place, argument in enumerate(arguments):
        if argument.startswith("--recipe="):
            return argument.removeprefix("--recipe=")
        if argument == "--recipe" and place + 1 < len(arguments):
            return arguments[place + 1]
    return DEFAULT_RECIPE
