"""Reading safetensors checkpoints: what is in the files, what a rank needs, and reading just that."""

from divisi.model.checkpoint.index import TensorInfo
from divisi.model.checkpoint.plan import plan_rank
from divisi.model.checkpoint.reader import Checkpoint
from divisi.model.errors import CheckpointError

__all__ = ["Checkpoint", "CheckpointError", "TensorInfo", "plan_rank"]
