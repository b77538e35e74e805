"""Configurations and tokenizers as transformers 4 reads them too, and what was written for it (vLLM, servers).

transformers 5 keeps all of a model's rotary positions in `rope_parameters`. Version 4 does not know that key, and takes its
defaults without a word. So the keys that it knows stand beside it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from sparsepass.graph.support import quiet_loading

_THETA_KEYS: Final = {"gpt_neox": "rotary_emb_base", "gpt_neox_japanese": "rotary_emb_base"}
_PARTIAL_KEYS: Final = {"gpt_neox": "rotary_pct", "gpt_neox_japanese": "rotary_pct", "stablelm": "partial_rotary_factor"}
_OF_EACH_LAYER: Final = {
    "modernbert": ("global_rope_theta", "local_rope_theta"),
    "modernbert-decoder": ("global_rope_theta", "local_rope_theta"),
}
_FULL, _SLIDING = "full_attention", "sliding_attention"
_OLD_TOKENIZER: Final = "PreTrainedTokenizerFast"


def add_older_keys(folder: Path) -> bool:
    """Add the keys of transformers 4 to config.json.

    Args:
        folder: The checkpoint.

    Returns:
        Whether transformers 4 reads all that is known here to have other keys. If not, nothing was added that would change
        what the installed transformers reads.
    """
    from transformers import AutoConfig

    path = folder / "config.json"
    text = path.read_text(encoding="utf-8")
    document = json.loads(text)
    changed = _with_older_keys(document)
    if changed == document:
        return True
    with quiet_loading():
        before = AutoConfig.from_pretrained(folder, trust_remote_code=False).to_dict()
        path.write_text(json.dumps(changed, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        try:
            after = AutoConfig.from_pretrained(folder, trust_remote_code=False).to_dict()
        except (ValueError, TypeError, LookupError):
            after = None
    if after != before:
        path.write_text(text, encoding="utf-8")
    return bool(after == before)


def _with_older_keys(part: Mapping[str, Any]) -> dict[str, Any]:
    found = {key: _with_older_keys(value) if isinstance(value, Mapping) else value for key, value in part.items()}
    rope = part.get("rope_parameters")
    if not isinstance(rope, Mapping) or "rope_scaling" in part:
        return found
    found["rope_parameters"] = rope
    kind = str(part.get("model_type", ""))
    if isinstance(rope.get(_FULL), Mapping):
        full, sliding = rope[_FULL], rope.get(_SLIDING) or {}
        names = _OF_EACH_LAYER.get(kind, ("rope_theta", "rope_local_base_freq"))
        found |= {name: each["rope_theta"] for name, each in zip(names, (full, sliding), strict=True) if "rope_theta" in each}
        scaling = _scaling(full, kind)
    else:
        if "rope_theta" in rope:
            found[_THETA_KEYS.get(kind, "rope_theta")] = rope["rope_theta"]
        if "partial_rotary_factor" in rope:
            found[_PARTIAL_KEYS.get(kind, "partial_rotary_factor")] = rope["partial_rotary_factor"]
        scaling = _scaling(rope, kind)
    return found | ({"rope_scaling": scaling} if scaling else {})


def _scaling(rope: Mapping[str, Any], kind: str) -> dict[str, Any] | None:
    if rope.get("rope_type", "default") == "default":
        return None
    found = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    if kind.startswith(("phi3", "phi4")):  # these refuse any other key
        return {"type": found["rope_type"]} | {key: found[key] for key in ("short_factor", "long_factor") if key in found}
    return found


def add_older_tokenizer_keys(folder: Path) -> None:
    """Name a tokenizer class in tokenizer_config.json that transformers 4 has, and special tokens as it reads them."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return
    settings = json.loads(path.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = _OLD_TOKENIZER  # the same class in transformers 5, by its older name
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
