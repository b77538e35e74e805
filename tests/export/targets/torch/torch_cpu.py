"""torch's CUTLASS tensors on a CPU: torch's own class, packing and dispatch; only the kernel is emulated, by unpacking."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass

from sparsepass.export.targets.torch import load, lower, measure as torch_measure
from sparsepass.export.targets.torch.kernels import MeasuredOn
from sparsepass.export.targets.torch.record import TO_BE_MEASURED, LayerRecord
from sparsepass.graph import Program, capture
from sparsepass.passes import apply_passes

CPU = torch.device("cpu")
GPU = MeasuredOn(name="emulated", sm=80, torch=str(torch.__version__))
TIMINGS = Path(__file__).parent / "data" / "torch_timings.json"


def _mm(packed: Tensor, meta: Tensor, dense: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    product: Tensor = sparse_semi_structured_to_dense_cutlass(packed, meta) @ dense
    return product


def _addmm(bias: Tensor, packed: Tensor, meta: Tensor, dense: Tensor, **_: object) -> Tensor:
    return torch.addmm(bias[:, None], sparse_semi_structured_to_dense_cutlass(packed, meta), dense)


@contextmanager
def emulated_kernels() -> Iterator[None]:
    """The CUTLASS kernels on the CPU, and a CPU that passes for a GPU of SM80."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_sparse_semi_structured_mm", _mm, "CPU")
    library.impl("_sparse_semi_structured_addmm", _addmm, "CPU")
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                SparseSemiStructuredTensorCUTLASS, "_validate_device_dim_dtype_shape", classmethod(lambda cls, tensor: None)
            )
            for module in (load, lower, torch_measure):
                patch.setattr(module, "check_device", lambda device: GPU)
            yield
    finally:
        library._destroy()


def tiny_llama() -> hf.LlamaForCausalLM:
    """Two layers, as small as CUTLASS's layout allows: 64 features."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    return hf.LlamaForCausalLM(config)


def tiny_gpt2() -> hf.GPT2LMHeadModel:
    """One layer, whose linear layers are Conv1D with a bias."""
    torch.manual_seed(0)
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=96, n_embd=64, n_layer=1, n_head=4, n_positions=32))


@cache
def _dense(model: Callable[[], nn.Module]) -> Program:
    return capture(model(), torch.arange(16).view(2, 8))


@cache
def pruned(model: Callable[[], nn.Module], passes: str = "nm_sparsify") -> Program:
    """A program to look at only: it is made once."""
    return apply_passes(_dense(model), passes, validate=False)


def write_timings(path: Path, gains: Mapping[tuple[int, int], Mapping[int, float]], **changes: object) -> Path:
    """Write times by which CUTLASS's kernels gain so much: shape -> tokens at once -> gain, without and with a bias."""
    times = [
        {
            "shape": list(shape),
            "bias": bias,
            "points": [
                {"batch": 1, "sequence": tokens, "dense_ms": gain, "sparse_ms": {"cutlass": 1.0}}
                for tokens, gain in found.items()
            ],
        }
        for shape, found in gains.items()
        for bias in (False, True)
    ]
    own = {"dtype": "bfloat16", "compiled": False, "backends": {"cutlass": "", "cusparselt": "not there"}, "times": times}
    path.write_text(json.dumps({"measured": {**GPU.to_dict(), **own, **changes}}))
    return path


def two_four(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A random weight that is 2:4, with groups that keep less than two."""
    weight = torch.randn(shape).unflatten(-1, (-1, 4))
    kept = torch.rand(weight.shape).topk(2, -1).indices
    weight = torch.zeros_like(weight).scatter(-1, kept, weight.gather(-1, kept))
    return (weight * (torch.rand(weight.shape) > 0.1)).flatten(-2).to(dtype)


def layer(name: str, shape: tuple[int, ...], *, bias: bool = False, eligible: bool = True) -> LayerRecord:
    waiting = LayerRecord(
        layer=name, shape=shape, bias=bias, sparse=True, eligible=True, state="to be measured", reason=TO_BE_MEASURED
    )
    return waiting if eligible else replace(waiting, eligible=False, state="dense", reason="shape rule")
