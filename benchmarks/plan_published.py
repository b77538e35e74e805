"""Compare `plan` with published measurements: ``python benchmarks/plan_published.py > benchmarks/results/plan_published.md``.

Needs no GPU and no weights. Device figures are the vendors'. The runtimes' constants come from other measurements than
the ones that are compared, except where the table says so.
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsepass.export.plan import Matmul, dense_time, find_device, find_runtime, load_for_plan, plan, sparse_time, weight_bits
from sparsepass.graph import Program

WITHIN = 0.20
LLAMA_2_7B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096,
    "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    "max_position_embeddings": 4096, "dtype": "float16",
}  # fmt: skip
LLAMA_3_8B = LLAMA_2_7B | {
    "vocab_size": 128256, "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 8192,
}  # fmt: skip
LLAMA_2_70B = LLAMA_2_7B | {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 8,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Row:
    """A published figure, or a range of them, and what `plan` says.

    Attributes:
        what: What was measured.
        source: By whom.
        low: Published; the lower end of a range.
        high: The upper end; the same for a single figure.
        predicted: By `plan`.
        remark: Why it is off, or why it does not count.
    """

    what: str
    source: str
    low: float
    high: float
    predicted: float
    remark: str = ""

    @property
    def off(self) -> float:
        """Relative distance to the figure, or to the nearer end of the range; 0 within it."""
        nearest = min(max(self.predicted, self.low), self.high)
        return self.predicted / nearest - 1

    @property
    def same_direction(self) -> bool:
        """Whether both say that 2:4 gains, or both that it does not."""
        return (self.predicted > 1.005) == (self.high > 1.005)


def gemm(gpu: str, runtime: str, tokens: int, in_features: int, out_features: int, dtype: Any = "fp16") -> float:
    """Predicted speedup of one layer."""
    machine = find_runtime(runtime).machine(find_device(gpu), dtype)
    matmul = Matmul(in_features=in_features, out_features=out_features, dtype=dtype)
    return float(dense_time(matmul, tokens, machine) / sparse_time(matmul, tokens, machine))


def program(config: dict[str, Any]) -> Program:
    """Capture a model from its configuration."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return load_for_plan(folder)


def decode(
    model: Program, gpu: str, runtime: str, *, batch: int = 1, dtype: str | None = None, everything: bool = False
) -> float:
    """Predicted speedup of a decoding step at 128 tokens of prompt and 128 of output."""
    found = plan(model, gpu=gpu, runtime=runtime, batches=(batch,), seqs=(128,), new_tokens=128, dtype=dtype).points[0]
    assert found.decode is not None
    assert found.everything[1] is not None
    return found.everything[1] if everything else found.decode.speedup


def named_in_methods(seven: Program) -> list[Row]:
    """The speeds in the design notes' methods.md, sections 2 and 5."""
    ast = "AST, arXiv 2407.20584"
    torch = "pytorch/pytorch issue 111339"
    ends = ("a100", "h100", "rtx4090", "l20")
    large = sum(gemm(gpu, "torch", 4096, 4096, 11008) for gpu in ends[:2]) / 2
    bandwidth = sum(gemm(gpu, "tensorrt-llm", 1, 4096, 11008) for gpu in ends) / 4
    return [
        Row(
            what="Llama-2-7B, fp16, batch 1, TensorRT-LLM, RTX 4090",
            source=ast,
            low=1.33,
            high=1.33,
            predicted=decode(seven, "rtx4090", "tensorrt-llm"),
            remark="that card's 2:4 kernels reach less of its bandwidth",
        ),
        Row(
            what="the same on L20, lower figure",
            source=ast,
            low=1.78,
            high=1.78,
            predicted=decode(seven, "l20", "tensorrt-llm"),
            remark="the dense baseline was not at the memory limit",
        ),
        Row(
            what="the same on L20, upper figure",
            source=ast,
            low=1.83,
            high=1.83,
            predicted=decode(seven, "l20", "tensorrt-llm"),
            remark="above 16/9 = 1.78, which bytes allow; as the row before",
        ),
        Row(
            what="4096 x 4096, 1 token, torch (A100 assumed)",
            source=torch,
            low=0.111,
            high=0.111,
            predicted=gemm("a100", "torch", 1, 4096, 4096),
        ),
        Row(
            what="large GEMMs, torch (11008 x 4096, 4096 tokens, mean of A100 and H100)",
            source="methods.md section 5",
            low=1.1,
            high=1.3,
            predicted=large,
        ),
        Row(
            what="kernels built for bandwidth, 1 token (mean of four GPUs)",
            source="methods.md section 5",
            low=1.3,
            high=1.8,
            predicted=bandwidth,
        ),
    ]


def storage() -> list[Row]:
    """The bounds and sizes in methods.md, sections 2 and 4."""
    bf16, int4 = weight_bits("bf16", sparse=True), weight_bits("int4", sparse=True)
    return [
        Row(what="decode bound, bf16", source="methods.md section 4", low=1.78, high=1.78, predicted=16 / bf16),
        Row(what="the same with SLoRB k=16", source="methods.md section 4", low=1.6, high=1.6, predicted=16 / (bf16 + 16 / 16)),
        Row(
            what="int4 2:4 against fp32, without scales",
            source="methods.md section 2",
            low=10.7,
            high=10.7,
            predicted=32 / weight_bits("int4", sparse=True, scales=False),
        ),
        Row(what="int4 2:4 against fp32, with scales", source="methods.md section 4", low=10.2, high=10.2, predicted=32 / int4),
        Row(
            what="the same as the paper's first version says",
            source="AST, arXiv 2407.20584, v1",
            low=16,
            high=16,
            predicted=32 / weight_bits("int4", sparse=True, scales=False),
            remark="the paper leaves the index bits out",
        ),
    ]


def others(seven: Program) -> list[Row]:
    """Measurements elsewhere: some gave the runtimes' constants, some show what `plan` does not model."""
    eight, seventy = program(LLAMA_3_8B), program(LLAMA_2_70B)
    constant = "gave a constant of the runtime: no independent check"
    rows = [
        Row(
            what="3072 x 10240, 3072 tokens, torch, A100",
            source="PyTorch tutorial, semi-structured sparsity",
            low=1.382,
            high=1.382,
            predicted=gemm("a100", "torch", 3072, 10240, 3072),
            remark=constant,
        ),
        Row(
            what="the same, GPU not stated (as fast as an H100), cached descriptors",
            source="pytorch/pytorch pull request 177866",
            low=1.15,
            high=1.15,
            predicted=gemm("h100", "torch", 3072, 10240, 3072),
            remark=constant,
        ),
        Row(
            what="the same before descriptors were cached",
            source="pytorch/pytorch pull request 177866",
            low=0.412,
            high=0.412,
            predicted=gemm("h100", "torch", 3072, 10240, 3072),
            remark="each call waits 0.39 ms; the plan takes calls to overlap",
        ),
        Row(
            what="Llama-3-8B, int4, Sparse-Marlin, decoding, A100",
            source="torchao, sparsity README",
            low=1.25,
            high=1.25,
            predicted=decode(eight, "a100", "tensorrt-llm", dtype="int4"),
            remark=constant,
        ),
        Row(
            what="Llama-2-7B decoding, torch, all layers, RTX 4090",
            source="pytorch/tutorials issue 3505",
            low=0.88,
            high=0.88,
            predicted=decode(seven, "rtx4090", "torch", everything=True),
            remark="CUTLASS costs the processor less, and dense waits for it too",
        ),
        Row(
            what="Llama-2-7B, batch 1, --weight_sparsity, H100",
            source="NVIDIA/TensorRT-LLM issue 1802",
            low=1.0,
            high=1.0,
            predicted=decode(seven, "h100", "tensorrt-llm"),
            remark="no sparse tactic was picked; a plan cannot know that",
        ),
    ]
    for batch, published in ((32, 1.62), (64, 1.52), (128, 1.35), (896, 1.30)):
        rows.append(
            Row(
                what=f"Llama-2-70B, fp8, batch {batch}, H100",
                source="NVIDIA Model Optimizer, benchmark.md",
                low=published,
                high=published,
                predicted=decode(seventy, "h100", "tensorrt-llm", batch=batch, dtype="fp8"),
                remark="its dense side runs on two GPUs; lengths not stated (128 + 128 taken)",
            )
        )
    return rows


def table(rows: list[Row]) -> str:
    """Rows as Markdown."""
    lines = ["| what | source | published | plan | off | direction | remark |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        published = f"{row.low:g}x" if row.low == row.high else f"{row.low:g} to {row.high:g}x"
        verdict = f"{row.off:+.0%}" + ("" if abs(row.off) <= WITHIN else " **miss**")
        direction = "same" if row.same_direction else "**other**"
        remark = row.remark if row.off else ""
        lines.append(f"| {row.what} | {row.source} | {published} | {row.predicted:.2f}x | {verdict} | {direction} | {remark} |")
    return "\n".join(lines)


def score(rows: list[Row]) -> str:
    """How many are right."""
    near, right = sum(abs(row.off) <= WITHIN for row in rows), sum(row.same_direction for row in rows)
    share = f"{near} of {len(rows)} ({near / len(rows):.0%}) within {WITHIN:.0%}"
    return f"{right} of {len(rows)} in the published direction, {share}."


def main() -> None:
    """Print everything."""
    seven = program(LLAMA_2_7B)
    speeds, sizes, rest = named_in_methods(seven), storage(), others(seven)
    print("# `plan` against published measurements\n")
    print("Printed by `python benchmarks/plan_published.py`; no GPU is involved.\n")
    print(f"## Speeds that methods.md names\n\n{table(speeds)}\n\n{score(speeds)}\n")
    print(f"## Sizes and bounds that methods.md names\n\n{table(sizes)}\n\n{score(sizes)}\n")
    print(f"## Both\n\n{score([*speeds, *sizes])}\n")
    print(f"## Measurements from elsewhere\n\n{table(rest)}\n\n{score(rest)}")


if __name__ == "__main__":
    main()
