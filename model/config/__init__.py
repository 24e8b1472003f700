"""The model's shape, from a Hugging Face `config.json` and the names of the tensors beside it. Imports no torch."""

from divisi.model.config.model_config import DTYPE_BYTES, DType, ModelConfig

__all__ = ["DTYPE_BYTES", "DType", "ModelConfig"]
