"""Memory and time of a model at a size, reckoned without running it and without torch.

`weights` counts parameters, exactly. `inference` adds up what is in memory at a step's peak, tensor
by tensor; it agrees with the peaks measured in `benchmarks/results` within 7 %, but for fp8 on a
Hopper GPU, which takes less. `training` does the same for one of several GPUs; its notes tell what
has been measured. `speed` reckons seconds from the work there is and the rates of one H100.
"""

from turbodit.plan.inference import Inference
from turbodit.plan.report import CARDS, RESERVE, Plan
from turbodit.plan.training import Training

__all__ = ["CARDS", "RESERVE", "Inference", "Plan", "Training"]
