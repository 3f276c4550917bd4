"""Whole training configurations by the name of the model, with the published hyper-parameters.

A recipe is a function without arguments: read it, call it, change what it returns. Of Wan2.1's
1.3B and 14B the numbers are those of TurboDiffusion (arXiv:2512.16093) and rCM (arXiv:2510.08431).
Nobody has published any for the other models, whose recipes take those of the same size.
SpriteWan's are our own (docs/training/spritewan.md).
"""

from turbodit.recipes.rcm import RCM
from turbodit.recipes.sla import SLA

__all__ = ["RCM", "SLA"]
