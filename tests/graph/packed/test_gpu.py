"""Products of packed weights on a GPU, against float64. On a processor, Triton's interpreter runs the kernels.

It has to be asked for before triton is first imported, so one test runs this file again in a process of its own.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass

from sparsepass.graph.packed.gpu import chosen_way, fastest, likely_way, packed_linear_gpu, ways
from sparsepass.graph.packed.gpu_ways import (
    GpuWeight,
    Way,
    check_stored,
    cutlass_codes,
    dense_weight,
    gpu_refusal,
    two_four_refusal,
)
from sparsepass.graph.packed.layout import Values, pack, unpack
from sparsepass.graph.support import SparsepassError

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
BF16 = torch.bfloat16
_OLD = "the interpreter of triton 3.6 fails with numpy 2.4"
runs = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="needs a CUDA device or the interpreter"),
]
SELECT = Way(name="select", rows=16, units=64)
GATHER = Way(name="gather", rows=16, units=64)
DOT = Way(name="dot", rows=16, units=16)


def stored(
    rows: int, columns: int, values: Values, group_size: int = 0, k: int = 0, bias: bool = False
) -> tuple[GpuWeight, Tensor]:
    """A random weight as it is stored, and what it is in float64, its branch folded in."""
    weight = torch.randn(rows, columns // 4, 4)
    kept = weight.abs().argsort(-1)[..., 2:]
    weight = torch.zeros_like(weight).scatter(-1, kept, weight.gather(-1, kept)).view(rows, columns)
    weight[0, :8] = 0  # groups of fewer than two
    packed = pack(weight, values=values, group_size=group_size)
    scales = None if packed.scales is None else packed.scales.bfloat16()
    if packed.scales is not None and scales is not None:
        packed = replace(packed, scales=scales.to(packed.scales.dtype))
    whole = unpack(packed).double()
    branch = torch.randn(rows, columns // k).to(BF16) if k else None
    if branch is not None:
        whole += branch.double().repeat_interleave(k, dim=1)
    added = torch.randn(rows) if bias else None
    tensors = [None if each is None else each.to(DEVICE) for each in (packed.kept, packed.codes, scales, branch, added)]
    kept_there, codes, *others = tensors
    assert kept_there is not None
    assert codes is not None
    return GpuWeight(values, kept_there, codes, others[0], group_size, others[1], k, others[2]), whole


def call(x: Tensor, weight: GpuWeight, way: Way | None = None) -> Tensor:
    values, kept, codes, scales, group_size, branch, k, bias = weight
    return packed_linear_gpu(x.to(DEVICE), kept, codes, scales, group_size, values, branch, k, bias, way=way).cpu()


def check(x: Tensor, weight: GpuWeight, whole: Tensor, way: Way | None) -> None:
    """Within rounding of x's type; dot and dense round the weights (a scale each) and sums of branches, too."""
    expected = x.double() @ whole.t()
    if weight.bias is not None:
        expected += weight.bias.cpu().double()
    got = call(x, weight, way)
    assert got.dtype == x.dtype
    assert got.shape == (*x.shape[:-1], whole.shape[0])
    rtol = {torch.float32: 1e-5, torch.float16: 2e-3, BF16: 1.2e-2}[x.dtype]
    error = (got.double() - expected).norm() / expected.norm()
    assert error < rtol, f"off by {error:.2g}"


@pytest.mark.skipif(INTERPRETED, reason="it starts the interpreter")
def test_all_of_this_file_in_the_interpreter() -> None:
    pytest.importorskip("triton", "3.7", reason=_OLD)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(Path(__file__))]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=Path(__file__).parents[3], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout


@pytest.mark.skipif(INTERPRETED, reason="it starts the interpreter")
def test_the_script_for_a_gpu_rehearses(tmp_path: Path) -> None:
    """It has to run at the first try where a GPU is."""
    pytest.importorskip("triton", "3.7", reason=_OLD)
    root = Path(__file__).parents[3]
    command = [sys.executable, str(root / "benchmarks" / "gpu_packed.py"), "--rehearse", "--out", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "gpu_packed_rehearsal.md").read_text(encoding="utf-8")
    assert "| products are right | yes |" in page
    assert "| int4 | " in page
    assert "left out" not in page


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize(
    ("capability", "values", "group_size"),
    [(80, "bf16", 0), (90, "bf16", 0), (80, "fp16", 0), (90, "int8", 0), (90, "int4", 64)],
)
def test_kernels_compile_for_a_gpu_without_one(capability: int, values: str, group_size: int) -> None:
    """The interpreter lets pass what the compiler refuses. One token must not go through shared memory but for its last sum."""
    pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from sparsepass.graph.packed import gpu_kernels

    dtype = "fp16" if values == "fp16" else "bf16"
    pointers = {"x": dtype, "x_words": "i64", "codes": "u8", "scales": "bf16", "branch": "bf16", "bias": "fp32", "y": dtype}
    pointers |= {"kept": {"int8": "i32", "int4": "i16"}.get(values, "i64"), "out": dtype, "parts": "fp32"}
    numbers = ("rows", "tokens", "x_stride", "splits", "size")
    groups = 0 if dtype == values or values == "bf16" else -(-1024 // (group_size or 1024))
    constants = {
        "UNITS": 128,
        "VALUES": values,
        "GROUPS": groups,
        "SIZE": group_size or 1024,
        "PARTS": 64,
        "K": 16,
        "K_BLOCK": 16,
    }
    constants |= {
        "HAS_BIAS": True,
        "GATHER": False,
        "WIDE": True,
        "EXACT": False,
        "SPLITS": 2,
        "STAGES": 1,
        "UNROLL": 2,
        "PER_THREAD": 2,
    }
    sizes = {
        "one_token": {"R": 8, "U": 64},
        "some_tokens": {"R": 32, "U": 16, "T": 16},
        "make_dense": {"R": 8, "U": 32},
        "add_splits": {"BLOCK": 512},
    }
    for name, own in sizes.items():
        kernel = getattr(gpu_kernels, name)
        names = [parameter.name for parameter in kernel.params]
        known = constants | own
        signature = {
            each: f"*{pointers[each]}" if each in pointers else "i32" if each in numbers else "constexpr" for each in names
        }
        source = ASTSource(
            fn=kernel,
            signature=signature,
            constexprs={(place,): known[each] for place, each in enumerate(names) if signature[each] == "constexpr"},
            attrs={(place,): [["tt.divisibility", 16]] for place, each in enumerate(names) if each in pointers},
        )
        compiled = compile(source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": True})
        assert compiled.asm["cubin"]
        if name == "one_token":
            wide = {"int8": "v2.b32", "int4": "b32"}.get(values, "v2.b64")
            assert re.search(rf"ld\.global\S*\.{re.escape(wide)}", compiled.asm["ptx"])
            assert compiled.metadata.shared <= 1024


class TestProducts:
    pytestmark = runs

    @pytest.mark.parametrize("way", [SELECT, GATHER, DOT], ids=lambda way: way.name)
    @pytest.mark.parametrize("tokens", [1, 3, 16])
    @pytest.mark.parametrize(("values", "group_size"), [("bf16", 0), ("fp16", 0), ("int8", 0), ("int8", 64), ("int4", 32)])
    def test_kinds_of_values(self, values: Values, group_size: int, tokens: int, way: Way) -> None:
        weight, whole = stored(12, 256, values, group_size, k=16, bias=True)
        check(torch.randn(tokens, 256).to(torch.float16 if values == "fp16" else BF16), weight, whole, way)

    @pytest.mark.parametrize("way", [SELECT, GATHER, DOT], ids=lambda way: way.name)
    @pytest.mark.parametrize(("rows", "columns"), [(1, 8), (13, 24), (33, 576), (5, 1032)])
    def test_rows_and_columns_that_fill_no_block(self, rows: int, columns: int, way: Way) -> None:
        weight, whole = stored(rows, columns, "bf16", k=8)
        check(torch.randn(2, columns).to(BF16), weight, whole, way)

    @pytest.mark.parametrize("way", [SELECT, GATHER, DOT], ids=lambda way: way.name)
    @pytest.mark.parametrize("group_size", [16, 32, 128, 384])
    def test_any_group_size(self, group_size: int, way: Way) -> None:
        weight, whole = stored(9, 320, "int4", group_size)
        check(torch.randn(1, 320).to(BF16), weight, whole, way)

    @pytest.mark.parametrize("way", [SELECT, GATHER], ids=lambda way: way.name)
    @pytest.mark.parametrize("values", ["bf16", "int8", "int4"])
    def test_float32_to_its_own_rounding(self, values: Values, way: Way) -> None:
        weight, whole = stored(7, 576, values, 0 if values == "bf16" else 64, k=24, bias=True)
        check(torch.randn(3, 576), weight, whole, way)

    @pytest.mark.parametrize("way", [SELECT, GATHER, DOT], ids=lambda way: way.name)
    @pytest.mark.parametrize("splits", [2, 5])
    def test_splits_of_the_columns(self, splits: int, way: Way) -> None:
        weight, whole = stored(10, 576, "int8", 64, k=16, bias=True)
        sizes = {"rows": way.rows, "units": 16, "tokens": way.tokens, "splits": splits}
        check(torch.randn(3, 576).to(BF16), weight, whole, Way(name=way.name, **sizes))

    @pytest.mark.parametrize("way", [SELECT, GATHER, DOT], ids=lambda way: way.name)
    @pytest.mark.parametrize(
        "cut",
        [
            lambda x: x[:, ::2],
            lambda x: x[:, 0],
            lambda x: x.view(3, -1)[:, 1:41],
            lambda x: x.view(3, -1)[:, 2:82:2],
            lambda x: x.view(-1)[3:43],
            lambda x: x.view(3, 4, 40).transpose(0, 1),
            lambda x: x[:1, 1].expand(5, 40),
        ],
    )
    def test_strided_inputs(self, cut: Callable[[Tensor], Tensor], way: Way) -> None:
        weight, whole = stored(6, 40, "bf16")
        check(cut(torch.randn(3, 4, 40).to(BF16)), weight, whole, way)

    def test_many_tokens_in_blocks(self) -> None:
        weight, whole = stored(20, 64, "bf16", k=16, bias=True)
        check(torch.randn(2, 20, 64).to(BF16), weight, whole, DOT)
        check(torch.randn(40, 64).to(BF16), weight, whole, Way(name="dense"))
        check(torch.randn(40, 64), weight, whole, None if INTERPRETED else Way(name="dense"))

    def test_what_is_likely_good_where_nothing_is_measured(self) -> None:
        weight, whole = stored(20, 2048, "bf16")
        for tokens in (1, 2, 16, 17):
            x = torch.randn(tokens, 2048).to(BF16)
            assert likely_way(x, weight).splits in (1, 4, 8)
            check(x, weight, whole, likely_way(x, weight))

    def test_no_token_at_all(self) -> None:
        weight, _ = stored(6, 40, "bf16")
        assert call(torch.randn(2, 0, 40), weight).shape == (2, 0, 6)

    @pytest.mark.parametrize(("values", "group_size"), [("bf16", 0), ("fp16", 0), ("int8", 0), ("int8", 16), ("int4", 64)])
    @pytest.mark.parametrize("columns", [24, 576])
    def test_unpacking_is_exact(self, values: Values, group_size: int, columns: int) -> None:
        weight, whole = stored(11, columns, values, group_size)
        assert torch.equal(dense_weight(weight, torch.float32).cpu(), whole.float())
        low = dense_weight(weight, BF16).cpu()
        if INTERPRETED:  # which cuts bits off instead of rounding (triton 3.9)
            torch.testing.assert_close(low.double(), whole, rtol=2**-7, atol=0)
        else:
            assert torch.equal(low, whole.float().to(BF16))

    def test_the_fastest_way_that_works_is_taken(self) -> None:
        weight, _ = stored(32, 512, "bf16")
        x = torch.randn(2, 512, dtype=BF16, device=DEVICE)
        order: list[Way] = []

        def timer(run: Callable[[], Any]) -> float:
            order.append(run.args[0])  # type: ignore[attr-defined]
            if order[-1].name == "gather":
                raise RuntimeError("out of resources")
            return 1.0 if len(order) == 2 else 2.0

        assert fastest(x, weight, timer=timer) == order[1]
        assert {way.name for way in order} == {"select", "gather", "dot"}

        def none(_: Callable[[], Any]) -> float:
            raise RuntimeError("no luck\nat all")

        with pytest.raises(SparsepassError, match=r"no kernel multiplies .* select: no luck; .*dot: no luck"):
            fastest(x, weight, timer=none)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnAGpu:
    @pytest.mark.parametrize("tokens", [1, 5, 16, 100, 1000])
    @pytest.mark.parametrize(("values", "group_size"), [("bf16", 0), ("int8", 0), ("int4", 128)])
    def test_every_way_worth_trying(self, values: Values, group_size: int, tokens: int) -> None:
        weight, whole = stored(512, 2048, values, group_size, k=16, bias=True)
        x = torch.randn(tokens, 2048).to(BF16)
        for way in ways(x, weight):
            check(x, weight, whole, way)

    def test_what_was_measured_is_kept_and_captured(self) -> None:
        weight, whole = stored(512, 2048, "bf16")
        x = torch.randn(1, 2048, dtype=BF16, device=DEVICE)
        call(x, weight)
        assert chosen_way(x, weight) is chosen_way(x, weight)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = packed_linear_gpu(x, weight.kept, weight.codes)
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.testing.assert_close(y.double().cpu(), x.double().cpu() @ whole.t(), rtol=0.02, atol=0.1)


def tried(tokens: int, weight: GpuWeight, dtype: torch.dtype = BF16) -> set[str]:
    return {way.name for way in ways(torch.empty(tokens, weight.shape[1], dtype=dtype, device="meta"), weight)}


def on_processor(rows: int, columns: int, values: Values = "bf16") -> GpuWeight:
    packed = pack(torch.randn(rows, columns) * (torch.arange(columns) % 2), values=values)
    return GpuWeight(values, packed.kept, packed.codes, packed.scales, 0, None, 0, None)


def test_ways_go_with_the_number_of_tokens() -> None:
    weight = on_processor(64, 512)
    assert tried(1, weight) == {"select", "gather"}
    assert tried(2, weight) == {"select", "gather", "dot"}
    assert tried(16, weight) == {"dot"}
    assert tried(17, weight) == {"dot", "dense", "torch"}
    assert tried(4096, weight) == {"dense", "torch"}
    assert tried(16, weight, torch.float32) == {"select", "gather"}
    assert tried(17, weight, torch.float32) == {"dense"}
    assert tried(4096, on_processor(8, 64)) == {"dense"}
    assert tried(4096, on_processor(64, 64, "int8")) == {"dense"}
    assert tried(1, on_processor(8, 8)) == {"select"}


def test_cutlass_reads_the_stored_values_with_reordered_codes() -> None:
    for rows, columns in ((32, 64), (96, 320)):
        weight = torch.randn(rows, columns // 4, 4)
        weight.scatter_(-1, torch.rand_like(weight).argsort(-1)[..., :2], 0)
        weight[1] = 0
        packed = pack(weight.view(rows, columns), values="bf16")
        assert torch.equal(sparse_semi_structured_to_dense_cutlass(packed.kept, cutlass_codes(packed.codes)), unpack(packed))


def test_torch_takes_whole_tiles_of_its_own_types() -> None:
    assert two_four_refusal(on_processor(32, 64), BF16) == ""
    assert two_four_refusal(on_processor(40, 64), BF16) == "out_features 40 is not a multiple of 32"
    assert two_four_refusal(on_processor(32, 64, "int8"), BF16).endswith("and these are int8")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kept": torch.zeros(4, 31, dtype=BF16)}, r"kept of a packed weight 4 x 64 has to be \[4, 32\], and is \[4, 31\]"),
        ({"kept": torch.zeros(32, 4, dtype=BF16).t()}, r"and is \[4, 32\] with gaps"),
        ({"scales": torch.ones(4, 1)}, "scales belong to integers, and bf16 has some"),
        ({"branch": torch.ones(4, 4), "k": 0}, r"branch of .* has to be \[4, 64\]"),
        ({"branch": torch.ones(4, 9), "k": 7}, "k divides 64, and k is 7"),
        ({"values": "int8", "scales": torch.ones(4, 6), "group_size": 12}, "a multiple of 8 columns, and group_size is 12"),
        ({"bias": torch.ones(5)}, r"bias of .* has to be \[4\]"),
    ],
)
def test_tensors_that_do_not_fit(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(SparsepassError, match=said):
        check_stored(on_processor(4, 64)._replace(**changes))


def test_inputs_that_do_not_fit() -> None:
    weight = on_processor(4, 64)
    with pytest.raises(SparsepassError, match=r"takes 64 features .* and the input is \[2, 32\] of torch.bfloat16"):
        packed_linear_gpu(torch.ones(2, 32, dtype=BF16), weight.kept, weight.codes)
    with pytest.raises(SparsepassError, match="float64"):
        packed_linear_gpu(torch.ones(2, 64, dtype=torch.float64), weight.kept, weight.codes)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes tensors of any device")
def test_without_a_gpu_it_says_so() -> None:
    weight = on_processor(4, 64)
    said = gpu_refusal(torch.device("cpu"))
    assert "Triton" in said or "run on NVIDIA GPUs, and this device is cpu" in said
    with pytest.raises(SparsepassError, match=r"NVIDIA GPUs|Triton"):
        packed_linear_gpu(torch.ones(2, 64, dtype=BF16), weight.kept, weight.codes)
