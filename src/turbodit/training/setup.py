"""What all training runs set up: processes, networks, optimizers, data, checkpoints, log."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import nn
from torch.distributed.fsdp import FSDPModule

from turbodit.checkpoints import ModelFolder, find_model, load_transformer
from turbodit.config import ModelConfig
from turbodit.device import choose_device
from turbodit.distributed import Mesh, join, leave, parallelize, seed_everything
from turbodit.model.wan import WanModel
from turbodit.text_encoder import TextEncoder, clean_prompt
from turbodit.training.compiled import prepare_blocks
from turbodit.training.config import TrainConfig
from turbodit.training.data import LatentDataset
from turbodit.training.networks import Experts, Transformer


@dataclass(frozen=True)
class Run:
    """The parts of a run that no method changes.

    Attributes:
        mesh: the processes.
        folder: the teacher's files.
        model: the teacher's preset or description, with the sampler that its files state.
        dtype: of the matrix products.
        source: the teacher's transformer; of two experts that of the one trained, or the first.
        times: rectified-flow times that are trained: all, or one expert's.
    """

    config: TrainConfig
    mesh: Mesh
    folder: ModelFolder
    model: ModelConfig
    dtype: torch.dtype
    source: Path
    times: tuple[float, float]

    @property
    def is_image_model(self) -> bool:
        """Whether a first frame may be given as the first latent frame."""
        return self.model.task == "ti2v"

    @property
    def boundary(self) -> float | None:
        """Between two experts that are trained in one run; None where one network is trained."""
        return self.model.sampling.boundary if self.config.expert is None else None

    @property
    def sources(self) -> tuple[Path, ...]:
        """Of all the teacher's transformers that take part: one, or both experts."""
        return (self.source,) if self.boundary is None else self.folder.transformers

    @property
    def image_share(self) -> float:
        return self.config.image_share if self.is_image_model else 0.0

    def generator(self) -> torch.Generator:
        """Of noise and times: alike in a context group, different elsewhere."""
        generator = torch.Generator(self.mesh.device)
        return generator.manual_seed((self.config.seed << 20) + self.mesh.data_rank)

    def common_generator(self) -> torch.Generator:
        """Alike in all processes; on the CPU, so that any number of them can go on with it."""
        of_no_data_rank = ((self.config.seed + 1) << 20) - 1
        return torch.Generator().manual_seed(of_no_data_rank)

    def same_generator(self) -> torch.Generator:
        """Alike in all processes, on the device where `trained` puts networks."""
        return torch.Generator(self._home).manual_seed(self.config.seed)

    def data(self) -> LatentDataset:
        """This process's samples.

        Raises:
            ValueError: none given.
        """
        if not self.config.data:
            raise ValueError("no data given; make some with turbodit synthesize or encode")
        mesh = self.mesh
        return LatentDataset(
            self.config.data,
            self.model,
            batch=self.config.batch,
            seed=self.config.seed,
            rank=mesh.data_rank,
            world=mesh.data_count,
        )

    def network(self, make: Callable[[Path], WanModel]) -> Transformer:
        """What `make` makes of the teacher's transformer; of two experts as one network."""
        if self.boundary is None:
            return make(self.source)
        high_noise, low_noise = (make(source) for source in self.sources)
        return Experts(high_noise, low_noise, self.boundary)

    def frozen(self, source: Path) -> WanModel:
        """A network that is only asked, spread over the mesh."""
        model = self._load(source, self.dtype, "sdpa", None).requires_grad_(False)
        return parallelize(model, self.mesh, self.dtype)

    def trained(
        self, source: Path, attention: str = "sdpa", settings: Mapping[str, Any] | None = None
    ) -> WanModel:
        """A network to train, not spread yet: `spread` does it when its parts are chosen."""
        stored = torch.float32 if self.config.master_weights else self.dtype
        return self._load(source, stored, attention, settings)

    def spread(self, model: WanModel) -> WanModel:
        """Over the mesh, compiled and with the checkpointing of the configuration."""
        compiled = self.config.compile and self.mesh.device.type == "cuda" and self.mesh.size == 1
        prepare_blocks(model, self.config.checkpointing, compiled=compiled)
        if self.mesh.size == 1:  # `forward` casts the weights, with less to do than FSDP
            return model.to(self.mesh.device)
        return parallelize(model, self.mesh, self.dtype)

    def forward(self, model: Transformer) -> Callable[..., torch.Tensor]:
        """`model`, of two experts that of the times, with matrix products in the run's dtype.

        Called as a WanModel is.
        """

        def call(
            latents: torch.Tensor, t: torch.Tensor, *others: torch.Tensor | None
        ) -> torch.Tensor:
            network = model.at(t) if isinstance(model, Experts) else model
            casts = self.mesh.size == 1 and network.patch_embedding.weight.dtype != self.dtype
            with torch.autocast(self.mesh.device.type, self.dtype, enabled=casts):
                velocity = network(latents.to(self.dtype), t, *others)
            if isinstance(network, FSDPModule) and not torch.is_grad_enabled():
                # Some weights stay whole for a backward pass, which here does not come: they would
                # be the old ones after an update, and stand where the shards are looked for.
                network.reshard()
            return velocity

        return call

    def adamw(self, parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.AdamW:
        return torch.optim.AdamW(
            list(parameters),
            lr=lr,
            betas=self.config.betas,
            weight_decay=self.config.weight_decay,
            fused=self.mesh.device.type == "cuda",
        )

    def encode_text(self, prompts: Iterable[str]) -> torch.Tensor:
        """(n, text_len, text_dim); the text encoder is there for this call only."""
        shape = self.model.transformer
        encoder = TextEncoder.from_pretrained(
            self.folder.text_encoder,
            self.folder.tokenizer,
            shape.text_len,
            self.dtype,
            self.mesh.device,
        )
        return torch.cat([encoder.encode([clean_prompt(prompt)]) for prompt in prompts])

    @property
    def _home(self) -> torch.device:
        """Where whole networks are loaded: a network that is to be sharded may not fit a GPU."""
        return torch.device("cpu") if self.mesh.size > 1 else self.mesh.device

    def _load(
        self, source: Path, dtype: torch.dtype, attention: str, settings: Mapping[str, Any] | None
    ) -> WanModel:
        with warnings.catch_warnings():
            # That is what the training is for.
            warnings.filterwarnings("ignore", message=".* was not trained with sparse-linear")
            return load_transformer(
                source,
                config=self.model.transformer,
                dtype=dtype,
                device=self._home,
                attention=attention,
                attention_settings=settings,
            )


@contextmanager
def open_run(config: TrainConfig) -> Iterator[Run]:
    """Join the other processes and find the teacher; leave at the end.

    Raises:
        FileNotFoundError: no such model.
        ValueError: a mesh, device or expert that is not possible; or another run has the folder.
        OSError: the folder cannot be written.
    """
    device = choose_device(config.device)
    folder = find_model(config.model)
    model = folder.config(() if config.transformer is None else (config.transformer,))
    config.check_model(model)
    source = config.transformer or folder.transformers[config.expert == "low-noise"]
    mesh = join(device, replicate=config.replicate, shard=config.shard, context=config.context)
    try:
        with _only_run(config.out) if mesh.is_first else nullcontext():
            seed_everything(config.seed, mesh)
            name = config.dtype or ("bfloat16" if mesh.device.type == "cuda" else "float32")
            dtype = getattr(torch, name)
            yield Run(config, mesh, folder, model, dtype, source, _times(config, model))
    finally:
        leave()


@contextmanager
def _only_run(out: Path) -> Iterator[None]:
    """While it lasts, no other run can have the folder; a killed one no longer has it."""
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out} is a file, expected a folder for the run")
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(f"another run is writing to {out}; give each its own folder") from error
    try:
        yield
    finally:
        lock.release()


def _times(config: TrainConfig, model: ModelConfig) -> tuple[float, float]:
    boundary = model.sampling.boundary
    if config.expert is None or boundary is None:
        return 0.0, 1.0
    return (boundary, 1.0) if config.expert == "high-noise" else (0.0, boundary)
