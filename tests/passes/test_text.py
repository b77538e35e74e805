"""Pipelines as text: round trip, and what a typo is told."""

import dataclasses

import pytest
from hypothesis import given, strategies as st

from sparsepass.graph import SparsepassError
from sparsepass.passes import PASSES, Fold, NMSparsify, SLoRB, parse_pipeline, pipeline_to_text
from sparsepass.passes.criteria.table import CRITERIA

_PATTERNS = st.lists(
    st.text(st.characters(codec="utf-8"), min_size=1).filter(lambda s: not s.startswith("re:")),
    max_size=3,
).map(tuple)


@given(
    st.sampled_from(["2:4", "1:4", "4:8"]),
    st.sampled_from([None, *CRITERIA]),
    st.floats(0, 1),
    st.integers(1, 512),
    _PATTERNS,
    st.integers(1, 64),
)
def test_every_pipeline_round_trips_through_text(
    pattern: str, criterion: str | None, damping: float, block_size: int, ignore: tuple[str, ...], k: int
) -> None:
    pipeline = (
        NMSparsify(pattern=pattern, criterion=criterion, damping=damping, block_size=block_size, ignore=ignore),
        SLoRB(k=k, targets=ignore, projection="trainable"),
        Fold(),
    )
    assert parse_pipeline(pipeline_to_text(pipeline)) == pipeline


def test_text_names_and_objects_mean_the_same() -> None:
    expected = (NMSparsify(criterion="wanda", pattern="2:4"), SLoRB(k=8))
    assert parse_pipeline("nm_sparsify{criterion=wanda,pattern=2:4},slorb{k=8}") == expected
    assert parse_pipeline(["nm_sparsify{criterion=wanda, pattern=2:4}", SLoRB(k=8)]) == expected
    assert parse_pipeline(" nm_sparsify { criterion = wanda } , slorb{k=8} ") == expected


def test_lists_of_patterns_are_json_or_one_word() -> None:
    (one,) = parse_pipeline("nm_sparsify{ignore=lm_head}")
    assert one.ignore == ("lm_head",)
    (two,) = parse_pipeline('nm_sparsify{ignore=["lm_head","re:.*(q|k)_proj"]}')
    assert two.ignore == ("lm_head", "re:.*(q|k)_proj")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("nm_sparsfy", "did you mean 'nm_sparsify'"),
        ("nm_sparsify{critrion=wanda}", "did you mean 'criterion'"),
        ("nm_sparsify{criterion=wnda}", "did you mean 'wanda'"),
        ("nm_sparsify{pattern=4:2}", "2:4"),
        ("nm_sparsify{pattern=0:4}", "0:4"),
        ("nm_sparsify{pattern=abc}", "abc"),
        ("nm_sparsify{damping=much}", "damping expects float"),
        ("nm_sparsify{block_size=0}", "block_size"),
        ("nm_sparsify{ignore=re:(}", "no regular expression"),
        ("slorb{k=0}", "at least 1"),
        ("slorb{k=2.5}", "k expects int"),
        ("slorb{init=meen}", "did you mean 'mean'"),
        ("slorb{k=4,k=8}", "twice"),
        ("slorb{k", "option=value"),
        ("slorb{k=4", "'}' is missing"),
        ("slorb}", "without its '{'"),
        ("slorb{}x", "expected ','"),
        (",", "name of a pass"),
        ("", "empty"),
        ("slorb,", "another pass"),
    ],
)
def test_mistakes_are_told_with_what_to_do(text: str, told: str) -> None:
    with pytest.raises(SparsepassError) as error:
        parse_pipeline(text)
    assert told in str(error.value)


def test_a_pass_that_is_no_pass_is_refused() -> None:
    with pytest.raises(SparsepassError, match="got int"):
        parse_pipeline([3])  # type: ignore[list-item]


def test_the_table_is_complete() -> None:
    for name, kind in PASSES.items():
        assert kind.name == name
        assert dataclasses.is_dataclass(kind)
        assert kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
        assert all(field.kw_only for field in dataclasses.fields(kind))
