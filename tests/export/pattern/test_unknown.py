"""Checkpoints that hold what the checker does not understand: it says so, and the pattern is not proven."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors import safe_open
from safetensors.torch import save_file
from tests.families import FAMILIES, Family
from torch import Tensor

from sparsepass.export.pattern import check_pattern
from sparsepass.graph import SparsepassError
from sparsepass.passes import apply_passes


def sparse(*shape: int, axis: int = -1) -> Tensor:
    values = torch.rand(shape).movedim(axis, -1).contiguous() + 0.5
    values.view(*values.shape[:-1], -1, 4)[..., :2] = 0
    return values.movedim(-1, axis).contiguous()


PLAIN = {"layers.0.self_attn.q_proj.weight": sparse(32, 32)}
U8 = torch.uint8


@pytest.mark.parametrize(
    ("tensors", "unknown"),
    [
        (
            {
                "mlp.experts.up_proj_blocks": torch.ones(4, 8, 1, 16, dtype=U8),
                "mlp.experts.up_proj_scales": torch.ones(4, 8, 1),
            },
            1,
        ),
        (
            {
                "up.compressed": torch.rand(4096),
                "up.bitmask": torch.ones(64, 16, dtype=U8),
                "up.shape": torch.tensor([64, 128]),
            },
            2,
        ),
        ({"up.weight.compressed": torch.rand(4096), "up.weight.bitmask": torch.ones(64, 16, dtype=U8)}, 2),
        ({"up.qweight": torch.ones(16, 64, dtype=torch.int32), "up.qzeros": torch.ones(1, 8, dtype=torch.int32)}, 1),
        ({"up.weight": torch.ones(2048, 1, dtype=U8), "up.weight.absmax": torch.ones(64)}, 1),
        ({"up.weight": torch.ones(4096, dtype=U8)}, 1),
        ({"up.W_q": torch.ones(64, 64, dtype=U8)}, 1),
        ({"up.Qidxs": torch.ones(512, 512, dtype=torch.int64)}, 1),
        ({"flat_param": torch.rand(1 << 20)}, 1),
        ({"dense.kernel": torch.rand(256, 256)}, 1),
        ({"block.0.weight": torch.rand(4, 32, 32)}, 1),
        # As large as the other weights, or codes of a type that only weights have.
        ({"up.kernel": torch.rand(32, 64)}, 1),
        ({"up.weight._data": torch.ones(32, 32, dtype=torch.int8), "up.weight._scale": torch.ones(32, 1)}, 1),
        ({"up._weight_qdata": torch.ones(32, 32, dtype=torch.int8), "up._weight_scale": torch.ones(32, 1)}, 1),
        # Zeros that are stored as another number.
        ({"up.weight": sparse(32, 32).to(torch.int8), "up.zero_point": torch.full((32, 1), 7, dtype=torch.int8)}, 1),
        ({"up.weight": sparse(32, 32).to(torch.int8), "up.weight.zeros": torch.full((32, 1), 7, dtype=torch.int8)}, 1),
    ],
)
def test_what_is_large_and_unknown_is_listed_and_proves_nothing(
    tensors: dict[str, Tensor], unknown: int, tmp_path: Path
) -> None:
    save_file(PLAIN | tensors, tmp_path / "model.safetensors")
    for source in (tmp_path, PLAIN | tensors):
        report = check_pattern(source)
        assert not report.conforms
        assert report.counts["not checkable"] == unknown, str(report)
    names = [entry.weight for entry in report.failures]
    assert check_pattern(PLAIN | tensors, ignore=names).conforms, "what is named is left out"
    assert check_pattern(PLAIN | tensors, expected_sparse=list(PLAIN)).conforms


def test_buffers_and_small_parameters_stand_in_no_ones_way() -> None:
    others = {
        "embeddings.position_ids": torch.arange(512)[None],
        "attn.bias": torch.ones(1, 1, 64, 64, dtype=torch.bool),
        "h.0.attn.bias": torch.ones(1, 1, 64, 64, dtype=U8),
        "attn.relative_position_index": torch.zeros(576, 576, dtype=torch.int64),
        "bn.num_batches_tracked": torch.tensor(3),
        "cls_token": torch.rand(1, 1, 64),
        "embeddings.position_embeddings": torch.rand(1, 197, 768),
        "mixer.A_log": torch.rand(512, 256),
        "mixer.conv1d.weight": torch.rand(64, 1, 4),
        "encoder.conv1.weight": sparse(64, 80, 3, axis=1),
        "norm.weight": torch.rand(4096),
    }
    report = check_pattern(PLAIN | others)
    assert report.conforms, str(report)


@pytest.mark.parametrize("kind", ["GraniteMoe", "GraniteMoeShared", "JetMoe"])
@pytest.mark.parametrize("wrong", [False, True])
def test_stacks_of_experts_are_judged_along_their_last_axis(kind: str, wrong: bool, tmp_path: Path) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    heads = {"num_key_value_heads": 2, "kv_channels": 8} if kind == "JetMoe" else {"num_key_value_heads": 2}
    config = getattr(hf, f"{kind}Config")(**sizes, **heads, num_local_experts=4, num_experts_per_tok=2)
    model = getattr(hf, f"{kind}ForCausalLM")(config)
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    stacked = [name for name, tensor in tensors.items() if tensor.dim() == 3]
    assert stacked
    tensors |= {name: sparse(*tensors[name].shape, axis=1 if wrong else 2) for name in stacked}
    save_file(tensors, path, metadata={"format": "pt"})
    report = check_pattern(tmp_path, expected_sparse=stacked)
    assert report.conforms is not wrong, str(report)


def test_the_weights_that_from_pretrained_loads_are_judged(tmp_path: Path) -> None:
    """A newer model.safetensors wins over the index of older shards, as it does in transformers."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2
    )
    pruned: Any = apply_passes(hf.LlamaForCausalLM(config), ["nm_sparsify"], progress=False).to_model()
    pruned.save_pretrained(tmp_path, max_shard_size="20KB")
    assert check_pattern(tmp_path, ignore=["lm_head"]).conforms
    dense: Any = hf.LlamaForCausalLM(config)
    save_file(dense.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert not check_pattern(tmp_path, ignore=["lm_head"]).conforms


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_nothing_of_a_common_model_is_called_unknown(family: Family) -> None:
    report = check_pattern(family.model().state_dict())
    assert not report.counts["not checkable"], str(report)


def test_a_pickle_that_transformers_would_load_is_not_passed_over(tmp_path: Path) -> None:
    save_file(PLAIN, tmp_path / "old.safetensors")
    assert check_pattern(tmp_path).conforms
    torch.save(PLAIN, tmp_path / "pytorch_model.bin")
    with pytest.raises(SparsepassError, match=r"transformers loads pytorch_model\.bin beside it"):
        check_pattern(tmp_path)
    assert check_pattern(tmp_path / "old.safetensors").conforms
