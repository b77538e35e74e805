"""Tiny random models of every causal language model that transformers maps, made from the defaults of their configurations."""

import copy
import dataclasses
import inspect
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, LAYERS, POSITIONS, WINDOW = 128, 64, 4, 2, 16, 2, 64, 8
FREE_IDS = 96
"""Inputs hold ids of 3 to 95; above are image tokens and the like."""

# Field -> small value; the first rule that matches counts, and only integers above it are made smaller.
_RULES: tuple[tuple[str, int], ...] = (
    (r"vocab_size|group_vocab", VOCABULARY),
    (r"^qk_rope_head_dim$", 8),
    (r"^qk_head_dim$", 24),
    (r"(kv_lora|o_lora)_rank|lora_rank|laurel_rank|lowrank|gate_rank|adapter_rank|time_step_rank", 16),
    (r"num_(key_value|kv)_heads|num_query_groups|index.*_kv_heads|num_key_value_groups", KV_HEADS),
    (r"linear_num_(key|value)_heads|linear_num_heads", HEADS),
    (r"mamba_(n|num)_heads|n_mamba_heads", 8),
    (r"index.*n_heads", 16),  # scores of fewer heads are often all zero, and what is equal is picked by chance
    (r"head_dim|^d_kv$|d_head|head_size|headdim", HEAD_DIM),
    (r"attention_heads|(^|_)n?_?heads?$|^n_head", HEADS),
    (r"rotary_dim", 8),
    (r"d_state|state_size", 16),
    (r"experts_per_tok|moe_?top_?k|moe_k$|top_k_experts|^num_topk$", 2),
    (r"n_shared_experts|num_shared_experts", 1),
    (r"zero_expert_num", 2),
    (r"num_(local_|routed_)?experts$|n_routed_experts|moe_num_experts", 4),
    (r"^n_group$|num_expert_group", 2),
    (r"topk_group|num_limited_groups", 1),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r"layer_end_index", LAYERS - 1),
    (r"num_hidden_layers|^n_layers?$|^num_layers$|(encoder|decoder)_layers$|num_(encoder|decoder)_layers|^num_blocks$|^depth$"
     r"|num_layers_per_stack|n_input_layers|n_recurrent_layers|n_output_layers", LAYERS),
    (r"max_position_embeddings|n_positions|max_seq_len|max_(target|source)_positions|context_length|model_max_length"
     r"|seq_length$|original_max_position", POSITIONS),
    (r"window|local_attention$|attention_chunk_size", WINDOW),
    (r"index_topk_blocks", 2),
    (r"index_block_size|^block_size$", 4),
    (r"index_topk|indexer_budget", 8),
    (r"image_size|tile_size", 32),
    (r"patch_size", 8),
    (r"chunk_size$|chunk_length", 8),
    (r"num_mel_bins", 16),
    (r"moe_intermediate|expert_intermediate|experts_intermediate|expert_ffn|moe_latent|shared_intermediate", 32),
    (r"hidden_size|d_model|n_embd|embed_dim$|embedding_dim$|emb_dim$|embedding_size$|embed_proj_dim|lru_width|d_ssm|d_embed"
     r"|projection_dim|out_hidden|n_inner|output_dim|fpn_hidden|proj_size|mid_dim|^dim$|hidden_dim$", HIDDEN),
    (r"intermediate|ffn|_ff$|feed_forward|d_inner|mlp_dim", HIDDEN),
    (r"_size$|_dim$|_width$|_channels$|num_centroids", HIDDEN),
)  # fmt: skip
_NOT_SMALLER = re.compile(r"kernel|stride|pad_|_token|_id$|_idx$|num_channels|in_channels|chunk_size_feed_forward|type_vocab")
_TOKEN_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "sep_token_id": 2}
_COUNTS_OF_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
_STANDARD_DEVIATION = 0.08  # of weights: large enough that attention and masks matter

_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16}
_GROUPED = {"n_group": 2, "topk_group": 1, "num_experts": 4, "num_experts_per_tok": 2}
# What the rules get wrong, for each model type.
_FIXES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": _GROUPED,
    "bamba": _MAMBA,
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}, "d_model": HIDDEN},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 16}},
    "dory": {
        "num_hidden_layers": 4, "n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "dots1": {
        "num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1,
        "topk_group": 1,
    },
    "dots3_note_text": {
        "num_key_value_heads": 4, "head_dim": 24, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16, "swa_head_dim": 24, "swa_qk_nope_head_dim": 16, "swa_v_head_dim": 16,
        "swa_qk_rope_head_dim": 8,
    },
    "falcon_h1": _MAMBA | {"mamba_d_ssm": 128},
    "gemma3n_text": {
        "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2,
        "intermediate_size": [HIDDEN] * 4, "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "granitemoehybrid": _MAMBA | {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2},
    "hunyuan_v1_dense": {"head_dim": HEAD_DIM},
    "hunyuan_v1_moe": {"head_dim": HEAD_DIM, "num_experts": 4, "moe_topk": 2},
    "kimi_linear": _GROUPED,
    "lfm2_moe": {"num_hidden_layers": 3, "num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"]},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": HEAD_DIM},
    "nemotron": {"head_dim": HEAD_DIM, "num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 16, "indexer_kv_heads": 1, "indexer_head_dim": HEAD_DIM, "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "reformer": {"axial_pos_embds_dim": [32, 32], "axial_pos_shape": [8, 8]},
    "xlnet": {"d_head": HEAD_DIM},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
}  # fmt: skip


def causal_language_models() -> dict[str, str]:
    """Model type -> class, as `AutoModelForCausalLM` maps them."""
    from transformers.models.auto import modeling_auto

    mapped = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
    return {kind: name if isinstance(name, str) else name[0] for kind, name in mapped}


def tiny_model(kind: str) -> nn.Module:
    """A model of that type with everything small, weights random."""
    import transformers

    torch.manual_seed(0)
    name = causal_language_models()[kind]
    model: nn.Module = getattr(transformers, name)(_decoder_config(kind, name)).eval()
    with torch.no_grad():  # norms and biases start as ones and zeros, which hide mistakes
        for parameter in model.parameters():
            if parameter.dim() == 1 and parameter.is_floating_point():
                parameter.add_(0.05 * torch.randn(parameter.shape).to(parameter.dtype))
    return model


def text(model: nn.Module, batch: int, length: int, padding: int = 0) -> dict[str, Tensor]:
    """Ids, and a mask where the model takes one; the first row begins with padding."""
    books = getattr(model.config, "num_codebooks", 0) if "musicgen" in model.config.model_type else 0
    generator = torch.Generator().manual_seed(1000 * batch + length)
    ids = torch.randint(3, FREE_IDS, (batch * (books or 1), length), generator=generator)  # one row for each codebook
    mask = torch.ones(batch, length, dtype=torch.long)
    if padding:
        mask[0, :padding], ids[0, :padding] = 0, 0
    takes_mask = "attention_mask" in inspect.signature(model.forward).parameters
    return {"input_ids": ids, "attention_mask": mask} if takes_mask else {"input_ids": ids}


def _decoder_config(kind: str, name: str) -> Any:
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[kind]
    config = _tiny_config(config_class, copy.deepcopy(_FIXES.get(kind, {})))
    wanted = getattr(getattr(transformers, name), "config_class", None)
    if wanted is not None and not isinstance(config, wanted):  # of a model of text and images, the text's
        parts = [getattr(config, part, None) for part in getattr(config_class, "sub_configs", None) or {}]
        config = next((part for part in parts if isinstance(part, wanted)), config)
    if getattr(config, "is_encoder_decoder", False):
        if "ForCausalLM" in name:
            config.is_decoder, config.is_encoder_decoder = True, False
    elif hasattr(config, "is_decoder"):
        config.is_decoder = True
    return config


def _tiny_config(config_class: Any, fixes: Mapping[str, Any]) -> Any:
    default = config_class()
    given = _as_arguments(config_class, _tiny_fields(default))
    given |= {name: value for name, value in fixes.items() if not isinstance(value, Mapping)}
    for name, sub in (getattr(config_class, "sub_configs", None) or {}).items():
        part = getattr(default, name, None)
        kind = type(part) if part is not None else sub
        if kind is None or kind.__name__ in ("AutoConfig", "NoneType") or (part is None and name not in fixes):
            continue
        own = copy.deepcopy(_FIXES.get(getattr(kind, "model_type", ""), {}))
        given[name] = _tiny_config(kind, own | dict(fixes.get(name, {})))
    given |= {name: value for name, value in fixes.items() if isinstance(value, Mapping) and name not in given}
    return config_class(**given)


def _as_arguments(config_class: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Only what the class takes: not what it computes from other fields, and other names as its own."""
    names = {field.name for field in dataclasses.fields(config_class)}
    own = {theirs: alias for alias, theirs in (getattr(config_class, "attribute_map", None) or {}).items()}
    renamed = {name if name in names else own.get(name, name): value for name, value in given.items()}
    return {name: value for name, value in renamed.items() if name in names}


def _tiny_fields(default: Any) -> dict[str, Any]:
    from transformers import PreTrainedConfig

    fields, plain = default.to_dict(), PreTrainedConfig().to_dict()
    given: dict[str, Any] = {}
    next_id = VOCABULARY - 1
    for name, value in fields.items():
        is_number = isinstance(value, int) and not isinstance(value, bool)
        if name in _TOKEN_IDS:
            given[name] = _TOKEN_IDS[name]
        elif name in plain or name.startswith("_"):
            continue
        elif is_number and re.search(r"_token_(id|index)$|_id$", name):
            if value >= FREE_IDS:
                given[name], next_id = next_id, next_id - 1
        elif name in ("initializer_range", "init_std"):
            given[name] = _STANDARD_DEVIATION
        elif (small := _smaller(name, value)) != value:
            given[name] = small
    if "qk_rope_head_dim" in given and "head_dim" in given:
        given["head_dim"] = given["qk_rope_head_dim"]
    if "kv_lora_rank" in fields and "num_key_value_heads" in given:  # one latent for all heads
        given["num_key_value_heads"] = given["num_attention_heads"]
    given |= _layer_lists(fields)
    rope = getattr(default, "rope_parameters", None)
    if rope and re.search("mrope_section|original_max_position", str(rope)):  # others are what the class computes by itself
        given["rope_parameters"] = _tiny_rope(rope, given.get("head_dim", fields.get("head_dim") or HEAD_DIM))
    return given


def _smaller(name: str, value: Any) -> Any:
    """The small value of a field where its rule has one; else the value itself."""
    if not isinstance(value, int) or isinstance(value, bool) or _NOT_SMALLER.search(name):
        return value
    return min(value, next((small for pattern, small in _RULES if re.search(pattern, name)), value))


def _layer_lists(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Lists with one entry a layer, cut down to layers that show every kind of entry."""
    named = next((name for name in _COUNTS_OF_LAYERS if isinstance(fields.get(name), int)), None)
    number = fields[named] if named is not None else 0
    lists = {name: each for name, each in fields.items() if isinstance(each, list) and len(each) == number > LAYERS}
    kinds = {name: each for name, each in lists.items() if isinstance(each[0], str) or name == "no_rope_layers"}
    chosen: list[int] = []
    seen: set[tuple[str, Any]] = set()
    for index in range(number) if kinds else ():
        entries = {(name, each[index]) for name, each in kinds.items()}
        if entries - seen:
            chosen.append(index)
            seen |= entries
    others = [index for index in range(number) if index not in chosen]
    chosen = sorted(chosen + others[: max(0, LAYERS - len(chosen))])
    cut = {name: [_smaller(name, each[index]) for index in chosen] for name, each in lists.items()}
    return {str(named): len(chosen), **cut} if kinds else cut


def _tiny_rope(rope: Mapping[str, Any], width: int) -> dict[str, Any]:
    small: dict[str, Any] = {}
    for name, value in rope.items():
        if isinstance(value, Mapping):
            small[name] = _tiny_rope(value, width)
        elif name in ("original_max_position_embeddings", "max_position_embeddings"):
            small[name] = POSITIONS // 2 if name.startswith("original") else POSITIONS
        elif name == "mrope_section":
            half = int(width * rope.get("partial_rotary_factor", 1.0)) // 2
            small[name] = [half - 2 * (half // 3), half // 3, half // 3]
        else:
            small[name] = value
    return small
