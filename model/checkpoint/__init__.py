"""Reading safetensors checkpoints: what is in the files, what a rank needs, and reading just that."""

from divisi.model.checkpoint.index import TensorInfo
from divisi.model.checkpoint.reader import Checkpoint
from divisi.model.checkpoint.shares import rank_tensors
from divisi.model.errors import CheckpointError

__all__ = ["Checkpoint", "CheckpointError", "TensorInfo", "rank_tensors"]
