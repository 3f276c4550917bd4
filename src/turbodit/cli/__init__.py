"""The command line, `turbodit COMMAND`: see `Command`, and `train`.

Nothing here imports torch before a command runs. Results go to stdout, everything else to
stderr. A mistake of the user's is one line and exit status 2; Ctrl-C is status 130.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro
from rich.console import Console
from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, subcommand

from turbodit import __version__
from turbodit.cli.bench import Bench
from turbodit.cli.compare import Compare
from turbodit.cli.encode import Encode
from turbodit.cli.eval import Eval
from turbodit.cli.generate import Generate, Switch
from turbodit.cli.merge import Merge
from turbodit.cli.plan import PlanCommand
from turbodit.cli.quantize import Quantize
from turbodit.cli.synthesize import Synthesize
from turbodit.cli.train import TrainRCM, TrainSLA, train_command

USER_ERROR, INTERRUPTED = 2, 130

# Where a GPU's memory does not suffice.
HINT = (
    "try --linear fp8 or int8-channel, --no-graph, --vae-tiling, --offload model or sequential, "
    "fewer frames or a smaller size"
)
TRAINING_HINT = (
    "try a smaller --batch with more --accumulate, --checkpointing block, --context, or more GPUs; "
    "--dry-run says what a run takes"
)


@dataclass(frozen=True)
class Doctor:
    """Say what is installed, which devices there are, and what runs on them."""

    json: Switch = False
    """Print the findings as JSON."""
    debug: Switch = False
    """Show the traceback of errors."""

    def run(self) -> None:
        from turbodit import doctor

        findings = doctor.diagnose()
        if self.json:
            print(json.dumps(findings))
        else:
            doctor.show(findings, Console())


Command = (
    Annotated[Generate, subcommand("generate")]
    | Annotated[Quantize, subcommand("quantize")]
    | Annotated[Merge, subcommand("merge")]
    | Annotated[PlanCommand, subcommand("plan")]
    | Annotated[Synthesize, subcommand("synthesize")]
    | Annotated[Encode, subcommand("encode")]
    | Bench
    | Eval
    | Annotated[Compare, subcommand("compare")]
    | Annotated[Doctor, subcommand("doctor")]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if list(arguments) == ["--version"]:
        print(f"turbodit {__version__}")
        return 0
    try:
        train = train_command(arguments)
    except ValueError as error:
        return _fail(str(error), USER_ERROR)
    kinds: Any = Command | train
    command = tyro.cli(
        kinds,
        prog="turbodit",
        description="Wan video diffusion made fast. `turbodit --version` prints the version.",
        args=arguments,
        config=(FlagCreatePairsOff, OmitArgPrefixes),
    )
    try:
        command.run()
    except KeyboardInterrupt:
        return _fail("interrupted; what is finished is kept, nothing is half-written", INTERRUPTED)
    except (ValueError, OSError, FloatingPointError) as error:
        if command.debug:
            raise
        number = f"[Errno {getattr(error, 'errno', None)}] "
        return _fail(str(error).removeprefix(number), USER_ERROR)
    except RuntimeError as error:
        # torch.OutOfMemoryError, by name: importing torch only to catch it would be slow.
        if command.debug or type(error).__name__ != "OutOfMemoryError":
            raise
        of_training = isinstance(command, (TrainSLA, TrainRCM))
        return _fail(f"{error}\n{TRAINING_HINT if of_training else HINT}", USER_ERROR)
    return 0


def _fail(message: str, status: int) -> int:
    print(f"turbodit: {message}", file=sys.stderr)
    return status
