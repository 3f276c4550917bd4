"""`turbodit plan`: what a model, or its training, takes of memory and time."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from rich.console import Console
from rich.table import Table
from tyro.conf import arg

from turbodit.cli.generate import Switch

if TYPE_CHECKING:
    from turbodit.config import ModelConfig
    from turbodit.plan import Plan


def _flag(metavar: str) -> Any:
    """A flag whose help says itself what is done without it."""
    return arg(metavar=metavar, help_behavior_hint="")


INFERENCE = ("linear", "residual", "no_graph")
TRAINING = ("gpus", "context_parallel", "fsdp", "batch", "part", "rank", "checkpointing",
            "no_master_weights", "both_experts")  # fmt: skip


@dataclass(frozen=True)
class PlanCommand:
    """Reckon the memory and the time of a video, or with --train of a training, and what fits.

    Nothing is run, and no GPU is needed. A step's memory agrees with measurements within 10 %; that
    of training is an estimate.
    """

    model: Annotated[str, _flag("NAME")] = "Wan2.1-T2V-1.3B"
    """A model's name. Default: Wan2.1-T2V-1.3B."""
    size: Annotated[str | None, _flag("W*H")] = None
    """Width and height in pixels, such as 832*480; by default the model's own."""
    frames: Annotated[int | None, _flag("N")] = None
    """Number of frames, 4k+1; by default the model's own."""
    attention: Annotated[str | None, _flag("NAME")] = None
    """sdpa, sage, sla or sagesla. Default: sdpa; for --train sla it is sla."""
    ratio: Annotated[float | None, _flag("X")] = None
    """Share of the key blocks that sparse attention keeps. Default: 0.1."""
    linear: Annotated[Literal["int8-block", "int8-channel", "fp8"] | None, _flag("FORMAT")] = None
    """8 bits for the linear layers: int8-block, int8-channel or fp8."""
    residual: Annotated[Literal["float32", "bfloat16"] | None, _flag("NAME")] = None
    """Residual stream of the transformer: float32 (the default) or bfloat16."""
    no_graph: Switch = False
    """Without a CUDA graph."""

    train: Annotated[Literal["sla", "rcm"] | None, _flag("METHOD")] = None
    """A training: sla (white-box fine-tuning) or rcm (distillation)."""
    gpus: Annotated[int | None, _flag("N")] = None
    """GPUs to train on. Default: 1."""
    context_parallel: Annotated[int | None, _flag("N")] = None
    """GPUs that share the tokens of a sample. Default: 1."""
    fsdp: Annotated[int | None, _flag("N")] = None
    """GPUs that share one copy of the weights; by default all."""
    batch: Annotated[int | None, _flag("N")] = None
    """Samples at a time on the GPUs that share their tokens. Default: 1."""
    part: Annotated[Literal["full", "attention", "proj_l", "lora"] | None, _flag("PART")] = None
    """What of the student trains: full (the default), attention, proj_l or lora."""
    rank: Annotated[int | None, _flag("N")] = None
    """Of a LoRA. Default: 32."""
    checkpointing: Annotated[Literal["none", "selective", "block"] | None, _flag("NAME")] = None
    """Which activations are computed again: none, selective or block (the default)."""
    no_master_weights: Switch = False
    """What trains is stored in bfloat16, not in float32."""
    both_experts: Switch = False
    """Of a model that has two, both in one run of rcm; otherwise one."""

    json: Switch = False
    """Print the result as JSON."""
    debug: Switch = False
    """Show the traceback of errors."""

    def run(self) -> None:
        """Reckon and print.

        Raises:
            ValueError: a mistake of the user's.
        """
        plan = self._plan()
        if self.json:
            print(json.dumps(plan.summary(), ensure_ascii=False))
        else:
            show(plan)

    def _plan(self) -> Plan:
        from turbodit.config import preset
        from turbodit.plan import Inference, Training

        self._check()
        model = preset(self.model)
        width, height = self._size(model)
        frames = model.frames if self.frames is None else self.frames
        video: dict[str, Any] = {"model": model, "width": width, "height": height, "frames": frames}
        given = self._given("attention", "ratio")
        if self.train:
            given |= self._given(*TRAINING)
            master = not given.pop("no_master_weights", False)
            return Training(**video, method=self.train, master_weights=master, **given).plan()
        given |= self._given("linear", "residual")
        return Inference(**video, graph=not self.no_graph, **given).plan()

    def _check(self) -> None:
        """Refuse flags that would change nothing."""
        misplaced = self._given(*(INFERENCE if self.train else TRAINING))
        if misplaced:
            flags = ", ".join("--" + name.replace("_", "-") for name in misplaced)
            where = "go without --train" if self.train else "need --train"
            raise ValueError(f"{flags}: such flags {where}")
        if self.rank is not None and self.part != "lora":
            raise ValueError("--rank is that of a LoRA: it needs --part lora")
        dense = self.attention in ("sdpa", "sage") or (
            self.attention is None and self.train != "sla"
        )
        if self.ratio is not None and dense:
            raise ValueError("--ratio is that of sparse attention: it needs sla or sagesla")

    def _size(self, model: ModelConfig) -> tuple[int, int]:
        from turbodit.batch import parse_size

        if self.size is not None:
            return parse_size(self.size)
        return next(iter(next(iter(model.sizes.values())).values()))

    def _given(self, *names: str) -> dict[str, Any]:
        """The flags that are set."""
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value not in (None, False)}


def show(plan: Plan) -> None:
    """Print the parts of every stage, the cards that have the memory, seconds and notes."""
    from turbodit.plan.report import CARDS, GIB

    console = Console()
    table = Table("", "GiB", title=plan.title)
    for stage, parts in plan.stages.items():
        table.add_row(f"[bold]{stage}", f"[bold]{sum(parts.values()) / GIB:.2f}")
        for part, size in parts.items():
            if size:
                table.add_row(f"  {part}", f"{size / GIB:.2f}")
        table.add_section()
    console.print(table)
    cards = Table("", "peak, GiB", *CARDS)
    for way in plan.ways:
        fits = ("fits" if fit else "no" for fit in plan.fits(way).values())
        cards.add_row(way, f"{plan.peak(way) / GIB:.2f}", *fits)
    console.print(cards)
    for name, seconds in plan.seconds.items():
        console.print(f"{name}: {seconds:.3g} s")
    for note in plan.notes:
        console.print(note, style="dim")
