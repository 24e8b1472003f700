"""The Qwen3-Next network with its MTP layer, differentiable, for training on whole batches."""

from divisi.model.demo.network.mixture import RouterLoad
from divisi.model.demo.network.network import Network, Pass

__all__ = ["Network", "Pass", "RouterLoad"]
