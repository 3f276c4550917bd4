"""Several devices for one model, applied from outside: the model's code knows nothing of it.

`join` makes the mesh, `parallelize` spreads a model over it, `checkpoint_blocks` trades memory
for a second forward pass. Names in state dicts never change.
"""

from turbodit.distributed.activation_checkpointing import Policy, checkpoint_blocks
from turbodit.distributed.mesh import Mesh, join, leave, seed_everything
from turbodit.distributed.parallelize import gradient_norm, parallelize

__all__ = [
    "Mesh",
    "Policy",
    "checkpoint_blocks",
    "gradient_norm",
    "join",
    "leave",
    "parallelize",
    "seed_everything",
]
