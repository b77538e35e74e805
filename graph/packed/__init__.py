"""2:4 weights in packed form: stored, in memory, and as layers of a model, for inference."""

from sparsepass.graph.packed.layout import FLOATS, PackedWeight, Values, check, check_form, pack, stored_form, unpack
from sparsepass.graph.packed.module import PackedLinear

__all__ = ["FLOATS", "PackedLinear", "PackedWeight", "Values", "check", "check_form", "pack", "stored_form", "unpack"]
