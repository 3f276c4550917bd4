"""Merging: what one training changed is added to the weights of another model.

    W = W_base + w * (W_target - W_diffbase)        task arithmetic, arXiv:2212.04089

With a distilled student as the base, the original model as the diff-base and an SLA-tuned one as
the diff-target this gives a student that is both (TurboDiffusion, arXiv:2512.16093). A LoRA is
such a difference stored by itself.

Files are read and written a tensor at a time: besides one result there are only the tensors that
it is made of. Arithmetic is in float32; what is stored has the base's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from turbodit.checkpoints.lora import LoRAFile, read_lora
from turbodit.checkpoints.packed import unpacked
from turbodit.checkpoints.rewrite import (
    Progress,
    check_space,
    check_target,
    counter,
    find_transformers,
    total_bytes,
    write_transformers,
)
from turbodit.checkpoints.stated import ATTENTION, SAMPLING, SETTINGS, Stated, read_stated
from turbodit.checkpoints.transformer import (
    LINEAR_BRANCH,
    Stored,
    empty_transformer,
    open_transformer,
)
from turbodit.config import TransformerConfig
from turbodit.weights import LazyTensor, LazyWeights, check_fit, lazy_weights, listing

PATCH_EMBEDDING = "patch_embedding."  # the only weights whose shape depends on the condition
# What is added to the weight of a name: float32, and read into memory of its own each time.
Deltas = Mapping[str, Sequence[LazyTensor]]


@dataclass(frozen=True)
class MergeReport:
    """What became of every parameter, by its original name.

    Attributes:
        merged: the base's weight with a difference added.
        copied: not in the base, or taken as a whole: parameters of SLA's linear branch.
        kept: the base's weight as it is -> why.
        missing: in the difference, but not in the result -> why.
    """

    merged: tuple[str, ...]
    copied: tuple[str, ...]
    kept: dict[str, str]
    missing: dict[str, str]

    def counts(self) -> dict[str, int]:
        return {name: len(value) for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Model:
    """A transformer whose weights stay on disk, under original names."""

    label: str  # what it is to the merge: "base", "diff-base", "diff-target"
    source: Path
    config: TransformerConfig
    weights: LazyWeights
    stated: Stated


def merge_difference(
    base: Path | str,
    diff_base: Path | str,
    diff_target: Path | str,
    target: Path | str,
    *,
    weight: float = 1.0,
    force: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Write base + weight * (diff_target - diff_base) to `target`.

    - A parameter that all three have in one shape is merged.
    - SLA's linear branch (proj_l) of `diff_target` is copied, in its own dtype, if `base` has none.
    - What only the base has, or has in another shape (the patch embedding, under the difference
      of a text-to-video model), is kept.
    - What the base has no place for (CLIP's layers) is left out, and reported as missing.

    Args:
        base, diff_base, diff_target: a transformer's file or folder as `load_transformer` takes
            it, not quantised; or a model with one transformer, by name or folder. Widths, heads
            and layers have to agree; the condition (input channels, CLIP) may differ.
        target: a `.safetensors` file, which gets original names, or a folder, which gets
            diffusers' layout.
        weight: of the difference.
        force: replace the file, or the weights in the folder.
        progress: told of every tensor that is written, as (stage, done, total).

    Raises:
        FileNotFoundError: nothing there, or a part of it is missing.
        FileExistsError: `target` is there, and not to be replaced.
        ValueError: a file that does not load or is quantised, architectures that differ, several
            transformers in one model, a target that is a source, lies in one or holds one, or
            results that are not finite.
        OSError: not enough space on the disk, or it cannot be written.
    """
    if not math.isfinite(weight):
        raise ValueError(f"the weight of the difference must be finite, got {weight}")
    labels = {"base": base, "diff-base": diff_base, "diff-target": diff_target}
    sources = {label: _one_transformer(label, source) for label, source in labels.items()}
    target = Path(target)
    check_target(target, [""], sources.values(), "merged", force)
    models = {label: _open(label, source) for label, source in sources.items()}
    for model in models.values():
        _check_family(models["base"], model)
    report = compare(*(model.weights for model in models.values()))
    old, new = models["diff-base"].weights, models["diff-target"].weights
    deltas = {name: [_difference(old[name], new[name], weight)] for name in report.merged}
    copied = {name: new[name] for name in report.copied}
    branch = models["diff-target"].stated if copied else None
    _write(target, models["base"], deltas, copied, branch, report, progress)
    return report


def merge_loras(
    base: Path | str,
    loras: Sequence[tuple[Path | str, float]],
    target: Path | str,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Write base + the sum of strength * LoRA to `target`, rounded once.

    Args:
        base, target, force, progress: as of `merge_difference`.
        loras: files in any form of `lora.read_lora`, and their strengths. A linear branch
            (proj_l) that a file brings as a whole is taken as it is, whatever the strength.

    Raises: as `merge_difference`; and
        ValueError: no LoRA, names or shapes that do not fit the model, or two files that both
            bring a linear branch.
    """
    if not loras:
        raise ValueError("no LoRA to merge")
    for path, strength in loras:
        if not math.isfinite(strength):
            raise ValueError(f"the strength of {path} must be finite, got {strength}")
    source, target = _one_transformer("base", base), Path(target)
    files = [Path(path) for path, _ in loras]
    check_target(target, [""], (source, *files), "merged", force)
    model = _open("base", source)
    deltas: dict[str, list[LazyTensor]] = {}
    copied: dict[str, LazyTensor] = {}
    kept: dict[str, str] = {}
    missing: dict[str, str] = {}
    branch: Stated | None = None
    for file, (_, strength) in zip(files, loras, strict=True):
        lora = read_lora(file, model.config)
        for name, delta in _fitting(lora, model, kept, missing).items():
            deltas.setdefault(name, []).append(_scaled(delta, strength))
        if lora.linear_branch:
            if copied:
                raise ValueError(f"{file}: another LoRA brought a linear branch (proj_l) already")
            copied |= lora.linear_branch
            branch = read_stated(lora.stated, f"the metadata of {file}")
    changed = deltas.keys() | copied.keys()
    kept = {name: "not in a LoRA" for name in model.weights if name not in changed} | {
        name: reason for name, reason in kept.items() if name not in changed
    }
    report = MergeReport(tuple(deltas), tuple(copied), kept, missing)
    _write(target, model, deltas, copied, branch, report, progress)
    return report


def compare(base: LazyWeights, diff_base: LazyWeights, diff_target: LazyWeights) -> MergeReport:
    """What merging these does with every parameter."""
    merged: list[str] = []
    copied: list[str] = []
    kept: dict[str, str] = {}
    missing: dict[str, str] = {}
    others = {"diff-base": diff_base, "diff-target": diff_target}
    for name, tensor in base.items():
        absent = [label for label, weights in others.items() if name not in weights]
        shapes = {label: weights[name].shape for label, weights in others.items() if not absent}
        if absent:
            kept[name] = f"not in {' and '.join(absent)}"
        elif set(shapes.values()) != {tensor.shape}:
            found = ", ".join(f"{shape} in {label}" for label, shape in shapes.items())
            kept[name] = f"shape {tensor.shape} in base, {found}"
        else:
            merged.append(name)
    for name in {**diff_target, **diff_base}:
        if name in base:
            continue
        if LINEAR_BRANCH in name and name in diff_target:
            copied.append(name)
        else:
            missing[name] = "not in base"
    return MergeReport(tuple(merged), tuple(copied), kept, missing)


def _one_transformer(label: str, source: Path | str) -> Path:
    found = find_transformers(source)
    if len(found) > 1:
        raise ValueError(
            f"{label} {source} has {len(found)} transformers; give one of them: "
            f"{', '.join(map(str, found.values()))}"
        )
    return next(iter(found.values()))


def _open(label: str, source: Path) -> Model:
    """A complete transformer in floating point, not read yet."""
    for name, tensor in lazy_weights(unpacked(source), mapped=False).items():
        if not tensor.dtype.is_floating_point or tensor.dtype.itemsize == 1:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(
                f"{label} {source} is quantised ({name} is {dtype}); expected weights in 16 bits "
                "or more: merge them first, then run `turbodit quantize`"
            )
    stored = open_transformer(source, mapped=False)
    attention = "sla" if any(LINEAR_BRANCH in name for name in stored.weights) else "sdpa"
    check_fit(empty_transformer(stored.config, None, attention), stored.weights, source)
    return Model(label, source, stored.config, stored.weights, stored.stated)


def _check_family(base: Model, other: Model) -> None:
    """Raise a ValueError unless two models differ in nothing but their condition."""
    condition: dict[str, Any] = {
        "in_dim": 0,
        "image_dim": None,
        "image_positions": None,
        "text_len": 0,
    }
    expected, got = (asdict(replace(m.config, **condition)) for m in (base, other))
    differing = [
        f"{key} {value}, expected {expected[key]}"
        for key, value in got.items()
        if value != expected[key]
    ]
    if differing:
        raise ValueError(
            f"{other.label} {other.source} is another architecture than base {base.source}: "
            f"{'; '.join(differing)}"
        )


def _fitting(
    lora: LoRAFile, model: Model, kept: dict[str, str], missing: dict[str, str]
) -> dict[str, LazyTensor]:
    """Those of a LoRA's differences that `model` has a place for; the others are noted."""
    fitting, misfits = {}, []
    for name, delta in lora.deltas.items():
        weight = model.weights.get(name)
        if weight is None:
            missing[name] = "not in base"
        elif delta.shape == weight.shape:
            fitting[name] = delta
        elif name.startswith(PATCH_EMBEDDING):
            kept[name] = f"shape {weight.shape} in base, {delta.shape} in {lora.source}"
        else:
            misfits.append(f"{name} {delta.shape}, expected {weight.shape}")
    if misfits:
        raise ValueError(
            f"{lora.source} was made for another model than base {model.source}: "
            f"{len(misfits)} of another shape: {listing(misfits)}"
        )
    return fitting


def _difference(old: LazyTensor, new: LazyTensor, weight: float) -> LazyTensor:
    def read() -> torch.Tensor:
        return new.read().to(torch.float32, copy=True).sub_(old.read()).mul_(weight)

    return LazyTensor(new.shape, torch.float32, read)


def _scaled(delta: LazyTensor, strength: float) -> LazyTensor:
    return LazyTensor(delta.shape, torch.float32, lambda: delta.read().mul_(strength))


def _sum(name: str, weight: LazyTensor, deltas: Sequence[LazyTensor]) -> LazyTensor:
    def read() -> torch.Tensor:
        first, *others = deltas
        total = first.read()
        for other in others:
            total.add_(other.read())
        result = total.add_(weight.read()).to(weight.dtype)
        if not result.isfinite().all():
            raise ValueError(f"{name}: the merged weight has NaN or infinite values")
        return result

    return LazyTensor(weight.shape, weight.dtype, read)


def _write(
    target: Path,
    base: Model,
    deltas: Deltas,
    copied: LazyWeights,
    branch: Stated | None,
    report: MergeReport,
    progress: Progress | None,
) -> None:
    """Write the merged model.

    Args:
        branch: what is stated where the linear branch comes from, if it is not the base's own.
    """
    if not report.merged:
        raise ValueError(
            f"nothing to merge into base {base.source}: none of its {len(base.weights)} "
            f"parameters is in the difference ({listing(sorted(report.missing)) or 'empty'})"
        )
    merged = {name: _sum(name, base.weights[name], parts) for name, parts in deltas.items()}
    weights = {**base.weights, **merged, **copied}
    attention = "sla" if any(LINEAR_BRANCH in name for name in weights) else "sdpa"
    check_fit(empty_transformer(base.config, None, attention), weights, base.source)
    stored = Stored(base.config, None, weights, _stated(base, attention, branch))
    check_space(target, total_bytes(weights))
    write_transformers(target, {"": stored}, counter("merge", progress, len(weights)))


def _stated(base: Model, attention: str, branch: Stated | None) -> Stated:
    """Of the result: the base's sampler, the attention of the branch."""
    owner = base.stated if branch is None else branch
    stated = {ATTENTION: attention} if attention == "sla" else {}
    stated |= {key: owner[key] for key in (ATTENTION, SETTINGS) if key in owner}
    return stated | {key: base.stated[key] for key in (SAMPLING,) if key in base.stated}
