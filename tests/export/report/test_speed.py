"""The section `speed` on the pages, and the answer that it gives."""

from typing import Any

import pytest
from tests.export.report.reports import answers, full_report, html_page, markdown_page

from sparsepass.export.report.document import new_report
from sparsepass.export.report.schema import check_report
from sparsepass.export.report.speed import SpeedSection
from sparsepass.graph import SparsepassError


def side(name: str, kernels: dict[str, int], **changes: Any) -> dict[str, Any]:
    packed = sum(kernels.values())
    return {
        "name": name, "source": f"/models/{name}", "architecture": "Llama", "dtype": "bfloat16", "num_packed": packed,
        "num_dense": 15 - packed, "kernels": kernels, "dense": {}, "disk_bytes": 270_000_000, "loaded_bytes": 280_000_000,
    } | changes  # fmt: skip


def section(kernels: dict[str, int], rates: tuple[float, ...] = (30.0, 20.0)) -> dict[str, Any]:
    sides = [side("ours", kernels, disk_bytes=180_000_000, loaded_bytes=182_000_000), side("dense", {})][: len(rates)]
    decoded = [
        {"prompt_tokens_per_second": 500.0, "first_token_s": 0.1, "new_tokens_per_second": r, "spread": 0.04} for r in rates
    ]
    read = [{"prompt_tokens_per_second": 20 * r, "first_token_s": 51.2 / r, "spread": 0.1} for r in rates]
    points = [
        {"phase": "decode", "batch": 4, "prompt_tokens": 32, "new_tokens": 33, "results": decoded},
        {"phase": "prefill", "batch": 1, "prompt_tokens": 512, "new_tokens": 1, "results": read},
    ]
    return {"sides": sides, "points": points, "device": "cpu", "processor": "a CPU", "threads": 2, "repeats": 5}


def used(document: dict[str, Any]) -> tuple[str, str, str]:
    (found,) = [answer for answer in answers(document) if answer.question == "Does a runtime use the sparsity?"]
    return found.short, found.tone, " ".join(found.sentences)


def test_the_pages_show_times_memory_and_size() -> None:
    document = check_report(new_report() | {"speed": section({"avx512": 14})})
    page = markdown_page(document)
    for line in (
        "| decoding, batch 4: tokens a second | 30.0 | 20.0 | 1.50x |",
        "| prefill of 512 tokens, batch 1: tokens a second | 600 | 400 | 1.50x |",
        "| time to first token, 512 tokens | 1.707 s | 2.56 s | 0.67x |",
        "| memory, loaded | 182.0 MB | 280.0 MB | 0.65x |",
        "| size on disk | 180.0 MB | 270.0 MB | 0.67x |",
    ):
        assert line in page
    assert "ours: 14 of 15 linear layers packed (kernel avx512 for 14), bfloat16." in page
    assert "Measured on a CPU; 2 threads: medians of 5 runs, the models taking turns." in page
    assert "up to 10% of their median" in page
    assert "while loading" not in page
    assert "<svg" in html_page(document)


@pytest.mark.parametrize(
    ("kernels", "rates", "short", "tone", "said"),
    [
        ({"avx512": 14}, (30.0, 20.0), "yes, 1.50 times as fast as dense", "good", "30.0 against 20.0 tokens a second"),
        ({"avx2": 14}, (18.0, 20.0), "yes, 0.90 times as fast as dense", "bad", "0.90 times dense"),
        ({"torch": 14}, (2.0, 20.0), "no, 0.10 times as fast as dense", "bad", "unpack each weight for each call"),
        ({}, (20.0, 20.0), "no, 1.00 times as fast as dense", "bad", "Zeros are multiplied as any other number"),
        ({"generic": 14}, (30.0,), "yes, 30.0 tokens a second", "good", "--against DENSE"),
    ],
)
def test_whether_a_runtime_uses_the_sparsity_is_answered_by_a_number(
    kernels: dict[str, int], rates: tuple[float, ...], short: str, tone: str, said: str
) -> None:
    found = used(new_report() | {"speed": section(kernels, rates)})
    assert found[:2] == (short, tone)
    assert said in found[2]
    assert "unknown" not in found[2].lower()


def test_what_another_runtime_tells_is_kept_where_nothing_is_packed() -> None:
    known = used(full_report())
    assert used(full_report() | {"speed": section({})}) == known
    assert used(full_report() | {"speed": section({"avx512": 14})})[0] == "yes, 1.50 times as fast as dense"


def test_a_forward_pass_is_the_main_figure_where_nothing_is_decoded() -> None:
    document = section({"avx512": 14})
    document["points"][0] |= {"phase": "forward", "new_tokens": 0}
    document["points"].pop()
    found = SpeedSection.model_validate(document)
    assert found.main is not None
    assert found.main.said == "forward pass, 32 tokens, batch 4"
    assert found.main.rates == [500.0, 500.0]
    assert SpeedSection.model_validate(document | {"points": []}).main is None
    assert used(new_report() | {"speed": document | {"points": []}})[0] == "yes"


def test_a_broken_section_is_refused() -> None:
    broken = section({})
    broken["points"][0]["batch"] = "four"
    with pytest.raises(SparsepassError, match=r"speed.points\[0\]: field 'batch' is 'four', expected integer"):
        check_report(new_report() | {"speed": broken})
