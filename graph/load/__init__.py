"""How a model enters: from a folder, the hub, a GGUF file, a saved program, or memory."""

from sparsepass.graph.load.checkpoint import choose_attention, tokenizer_in
from sparsepass.graph.load.contents import check_all_used, check_plain, check_plain_state
from sparsepass.graph.load.described import LOADING_ERRORS, check_numbers
from sparsepass.graph.load.dtypes import check_fits, parse_dtype
from sparsepass.graph.load.gguf import check_gguf, split_parts
from sparsepass.graph.load.model import LoadedModel, check_model, load_model
from sparsepass.graph.load.sidecars import card_facts, save_companions

__all__ = [
    "LOADING_ERRORS",
    "LoadedModel",
    "card_facts",
    "check_all_used",
    "check_fits",
    "check_gguf",
    "check_model",
    "check_numbers",
    "check_plain",
    "check_plain_state",
    "choose_attention",
    "load_model",
    "parse_dtype",
    "save_companions",
    "split_parts",
    "tokenizer_in",
]
