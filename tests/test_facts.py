"""Each fact has one home: patterns that would be a second one, and the files in which they may stand."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CODE = sorted(path for folder in ("graph", "passes", "retrain", "export") for path in (ROOT / folder).rglob("*.py"))

FACTS: dict[str, tuple[str, set[str]]] = {
    "position limit": (r"max_position_embeddings|n_positions|max_target_positions", {"graph/limits/positions.py"}),
    "nearest name": (r"get_close_matches", {"graph/support/words.py"}),
    "name patterns": (r"\bfnmatch|startswith\(\"re:\"\)", {"graph/support/words.py"}),
    "first line of an error": (r"def _?first_line|splitlines\(\)\[0\](?!$)", {"graph/support/words.py"}),
    "quieting transformers": (r"set_verbosity_error|disable_progress_bar\(", {"graph/support/contexts.py"}),
    "masked weight of a site": (
        r"masked_weight\([^()]*program\.tensor|torch\.ops\.sparsepass\.masked_weight\(\w+\.detach\(\)",
        {"graph/program.py"},
    ),
    "switching branches off": (r"def _?\w*(without|muted|mute)_branches\(program: Program[,)].*Iterator", {"graph/rewrite.py"}),
    "copying a program": (r"(?<![\w`\"])Program\($", {"graph/program.py", "graph/capture/exporter.py"}),
    "perplexity": (r"def perplexity|exp\((nll|loss|mean_nll)", {"graph/perplexity.py"}),
    "moving a file over another": (
        r"os\.replace\(",
        # Checkpoints and sampled text move when they are done; the builder's children know nothing of this package.
        {
            "graph/support/files.py",
            "graph/support/temporaries.py",
            "graph/support/checksums.py",
            "retrain/run/checkpoint.py",
            "export/targets/tensorrt/child.py",
            "export/targets/tensorrt/through_torch_child.py",
        },
    ),
    "reading jsonl": (
        r"parse_json\(line",
        {"graph/texts/rows.py", "retrain/run/metrics.py"},
    ),  # the latter is its own file
    "whether a weight is the original one": (
        r"\bchanged_by=|history\b.*\bslorb|record\.text\.startswith",
        {"graph/program.py", "graph/fusion.py", "passes/manager.py", "retrain/trainee.py"},
    ),  # fusion carries it over
    "version of a package that may be missing": (r"PackageNotFoundError", {"graph/support/machine.py"}),
    "reading parquet": (r"parquet\.\w*(File|read)|pq\.|import pyarrow\.parquet", {"graph/texts/rows.py"}),
}


@pytest.mark.parametrize("fact", FACTS)
def test_each_fact_has_one_home(fact: str) -> None:
    pattern, homes = FACTS[fact]
    found = {
        str(path.relative_to(ROOT))
        for path in CODE
        if any(re.search(pattern, line) for line in path.read_text(encoding="utf-8").splitlines() if ">>>" not in line)
    }
    assert found == homes
