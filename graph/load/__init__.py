"""How a model enters: from a folder, the hub, a GGUF file, a saved program, or memory."""

from sparsepass.graph.load.dtypes import check_fits, parse_dtype
from sparsepass.graph.load.model import LoadedModel, load_model

__all__ = ["LoadedModel", "check_fits", "load_model", "parse_dtype"]
