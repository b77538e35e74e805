"""How many positions a model has: the longest sequence that it can take."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# The first that a configuration has counts. Each architecture has one of its own.
_NAMES = (
    "max_position_embeddings", "n_positions", "max_target_positions", "max_decoder_position_embeddings", "max_seq_len",
    "model_max_length", "context_length", "seq_length",
)  # fmt: skip
# Parts of a configuration that describe the part of a model that reads and writes text.
_TEXT_PARTS = ("text_config", "decoder", "generator", "thinker_config", "llm_config", "language_config")
# Distances between tokens in place of positions; what their configurations call a length is that of the training texts.
_UNLIMITED = {"bloom", "longt5", "mt5", "switch_transformers", "t5", "transfo-xl", "umt5", "xlnet"}
# The table of positions begins with the padding token's, so that this many entries and one more are never a token's.
_PADDING_OFFSET = {
    "altclip_text_model", "bridgetower_text_model", "camembert", "clap_text_model", "data2vec-text", "esm", "ibert",
    "layoutlmv3", "lilt", "longformer", "luke", "markuplm", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta",
    "xlm-roberta-xl", "xmod",
}  # fmt: skip


def position_limit(config: "Mapping[str, Any] | PretrainedConfig | None") -> int | None:
    """Tokens that a model can take at once, by its configuration.

    1. The part that describes text counts (``text_config``, ``decoder``); without one, the configuration itself.
    2. RoBERTa and its kin lose the positions up to that of the padding token: 512 are left of 514.
    3. There is no limit where positions are distances (ALiBi, T5), or where the configuration says nothing.

    Args:
        config: A configuration of transformers, or its dict; None for a plain module.

    Returns:
        The number of positions, or None where there is no limit.

    Example:
        >>> position_limit({"n_positions": 1024}), position_limit({"text_config": {"max_position_embeddings": 77}})
        (1024, 77)
        >>> position_limit({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1})
        512
        >>> position_limit({"model_type": "falcon", "alibi": True, "max_position_embeddings": 2048}) is None
        True
    """
    if config is None:
        return None
    facts = config if isinstance(config, Mapping) else config.to_dict()
    for name in _TEXT_PARTS:
        part = facts.get(name)
        if isinstance(part, Mapping) and (limit := position_limit(part)) is not None:
            return limit
    kind = facts.get("model_type")
    if kind in _UNLIMITED or facts.get("alibi"):
        return None
    limit = next((size for name in _NAMES if isinstance(size := facts.get(name), int) and size > 0), None)
    if limit is not None and kind in _PADDING_OFFSET and facts.get("position_embedding_type", "absolute") == "absolute":
        padding = facts.get("pad_token_id")
        limit -= 1 + (padding if isinstance(padding, int) else 1)
    return limit


def default_context(config: "Mapping[str, Any] | PretrainedConfig | None") -> int:
    """Tokens of a sequence where nothing is said: 2048, or fewer if the model has fewer positions.

    Example:
        >>> default_context({"n_positions": 1024}), default_context(None)
        (1024, 2048)
    """
    return min(2048, position_limit(config) or 2048)
