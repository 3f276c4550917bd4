"""Put the trained teacher and what it shares with its student together as one model folder.

    python -m turbodit.spritewan.assemble --teacher runs/teacher/transformer \
        --vae runs/vae/vae --text-encoder runs/text/text_encoder \
        --tokenizer runs/text/tokenizer --out src/turbodit/assets/spritewan

The layout is diffusers', with `teacher/`, whose weights are packed (`checkpoints.packed`), beside
the place of the student, `transformer/`, which `spritewan.turbo` makes. Until it is there the
folder loads with `turbodit generate --model FOLDER --transformer FOLDER/teacher`.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import tyro

from turbodit.checkpoints.packed import pack
from turbodit.config import PRESETS

MODEL_INDEX = {
    "_class_name": "WanImageToVideoPipeline",
    "boundary_ratio": None,
    "expand_timesteps": True,  # a time per latent frame: Wan 2.2's TI2V form
    "image_encoder": [None, None],
    "image_processor": [None, None],
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "transformer_2": [None, None],
    "vae": ["diffusers", "AutoencoderKLWan"],
}


PARTS = ("teacher", "vae", "text_encoder", "tokenizer")


@dataclass(frozen=True)
class Options:
    teacher: Path
    vae: Path
    text_encoder: Path
    tokenizer: Path
    out: Path


def assemble(options: Options) -> None:
    """Copy the parts into `options.out`, the teacher's weights packed; parts that are there
    already are replaced.

    Raises:
        FileNotFoundError: a part is missing.
    """
    sources = {name: getattr(options, name) for name in PARTS}
    missing = [str(source) for source in sources.values() if not source.is_dir()]
    if missing:
        raise FileNotFoundError(f"no such folder: {', '.join(missing)}")
    for name, source in sources.items():
        target = options.out / name
        partial = options.out / f"{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(source, partial)
        if name == "teacher":
            pack(partial)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    _write_scheduler(options.out / "scheduler")
    (options.out / "model_index.json").write_text(json.dumps(MODEL_INDEX, indent=2) + "\n")


def _write_scheduler(folder: Path) -> None:
    from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

    UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=PRESETS["spritewan"].sampling.shift,
    ).save_pretrained(folder)


if __name__ == "__main__":
    assemble(tyro.cli(Options))
