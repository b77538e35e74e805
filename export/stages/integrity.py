"""What belongs to a model beside its numbers: that a folder's files tell one story, and that two folders tell the same."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from sparsepass.export.report import ReportDocument, find_report
from sparsepass.graph import Program
from sparsepass.graph.fusion import split_siblings
from sparsepass.graph.load import tokenizer_in
from sparsepass.graph.saved import PROGRAM_FILE
from sparsepass.graph.support import INFINITIES, read_json, read_object
from sparsepass.graph.texts import tokenizing

_IDS: Final = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
_SPECIAL: Final = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")
_NO_SETTINGS: Final = ("transformers_version", "_from_model_config", "_commit_hash")
_MASKED: Final = "sparsepass.masked_weight"
_PROBES: Final = (
    "".join(map(chr, range(32, 127))),
    "The quick brown fox jumps over the lazy dog; 0123456789 times.",
    "def f(x):\n\treturn  x + 1\n\nÜber naïve 模型 ✓",
)
_GENERATION, _TOKENIZER, _CONFIG = "generation_config.json", "tokenizer.json", "config.json"


@final
@dataclass(frozen=True, kw_only=True)
class Side:
    """One of two that are compared.

    Attributes:
        name: What the user calls it.
        folder: Where its files lie, if it is a folder or a file in one.
        model: The model, if it was loaded.
        tokenizer: Its tokenizer, if it has one.
    """

    name: str
    folder: Path | None
    model: Any = None
    tokenizer: Any = None


def folder_contradictions(folder: Path) -> tuple[str, ...]:
    """Where the files of a saved program contradict each other, one sentence each; nothing for other folders.

    The graph tells which weights are read through a mask, the state which are sparse, the report which passes were applied.

    Args:
        folder: A folder that can be read as a program.
    """
    if not (folder / PROGRAM_FILE).is_file():
        return ()
    document = read_object(folder / PROGRAM_FILE, advice="copy the folder again")
    nodes = {node["name"]: node for node in document["graph"]["nodes"]}
    masked = [nodes[node["args"][0]["node"]]["target"] for node in nodes.values() if str(node["target"]).startswith(_MASKED)]
    found = [
        f"{PROGRAM_FILE}: the graph reads {name} through a mask, and its sparse state is gone"
        for name in dict.fromkeys(masked)
        if name not in document["sparse"]
    ]
    report = find_report(folder)
    if report is not None:
        found += _of_report(ReportDocument.parse(report), document)
    return tuple(found)


def _of_report(report: ReportDocument, program: Mapping[str, Any]) -> Iterator[str]:
    """Where a report tells of another program."""
    recipe = ",".join(record["text"] for record in program["history"])
    if report.recipe != recipe:
        yield f"report.json is of another program: its passes are {report.recipe!r}, and those of {PROGRAM_FILE} {recipe!r}"
    if report.passes is not None and report.passes.num_sparse != len(program["sparse"]):
        yield (
            f"report.json is of another program: it counts {report.passes.num_sparse} sparse weights, and {PROGRAM_FILE} has "
            f"{len(program['sparse'])}"
        )
    trained = 0 if report.retraining is None else len(report.retraining.runs)
    known = len(program.get("retraining", ()))
    if trained != known:
        yield f"report.json tells of {trained} trainings, and {PROGRAM_FILE} of {known}"


def companion_differences(a: Side, b: Side) -> tuple[str, ...]:
    """How two models differ beside their numbers, one sentence each: sparse states, tokenizers, token ids, generation.

    What only one of them has is not compared.
    """
    found = [*_of_states(a, b), *_of_tokenizers(a, b), *_of_ids(a, b)]
    return (*found, *_of_generation(a, b))


def _of_states(a: Side, b: Side) -> Iterator[str]:
    if not (isinstance(a.model, Program) and isinstance(b.model, Program)):
        return
    one, other = ({n: state.pattern for n, state in split_siblings(side.model).sparse.items()} for side in (a, b))
    for name in dict.fromkeys([*one, *other]):
        if one.get(name) != other.get(name):
            yield f"{name} is {one.get(name, 'dense')} in {a.name}, and {other.get(name, 'dense')} in {b.name}"


def _of_tokenizers(a: Side, b: Side) -> Iterator[str]:
    one, other = _tokenizer(a), _tokenizer(b)
    if one is None or other is None:
        return
    known, found = one.get_vocab(), other.get_vocab()
    where = f"the tokenizers differ ({_TOKENIZER} in {b.name})"
    if (token := next((t for t in {**known, **found} if known.get(t) != found.get(t)), None)) is not None:
        yield f"{where}: the token {token!r} is {known.get(token)} in {a.name}, and {found.get(token)} in {b.name}"
    elif _ids(one) != _ids(other):
        yield f"{where}: they split one text in different ways"
    for name in _SPECIAL:
        if getattr(one, name, None) != getattr(other, name, None):
            yield f"{where}: {name} is {getattr(one, name, None)} in {a.name}, and {getattr(other, name, None)} in {b.name}"
    if getattr(one, "chat_template", None) != getattr(other, "chat_template", None):
        yield f"{where}: their chat templates are not the same"


def _ids(tokenizer: Any) -> list[list[int]]:
    with tokenizing(tokenizer):
        return [tokenizer.encode(text) for text in _PROBES]


def _tokenizer(side: Side) -> Any:
    """The tokenizer of a side, or the one that lies beside its file."""
    if side.tokenizer is not None or side.folder is None or not (side.folder / "tokenizer_config.json").is_file():
        return side.tokenizer
    return tokenizer_in(side.folder, str(side.folder))


def _of_ids(a: Side, b: Side) -> Iterator[str]:
    one, other = _configuration(a), _configuration(b)
    for name in _IDS:
        here, there = one.get(name), other.get(name)
        if here is not None and there is not None and _listed(here) != _listed(there):
            yield f"{name} is {here} in {a.name}, and {there} in {b.name} ({_CONFIG})"


def _configuration(side: Side) -> Mapping[str, Any]:
    if isinstance(side.model, Program):
        return side.model.origin.config or {}
    config = getattr(side.model, "config", None)
    if config is not None and hasattr(config, "to_dict"):
        found: dict[str, Any] = config.to_dict()
        return found
    return _json(side, _CONFIG)


def _of_generation(a: Side, b: Side) -> Iterator[str]:
    one, other = _json(a, _GENERATION), _json(b, _GENERATION)
    if not one or not other:
        return
    from transformers import GenerationConfig

    usual = GenerationConfig().to_dict()
    for name in sorted({*one, *other} - {*_NO_SETTINGS}):
        here, there = one.get(name, usual.get(name)), other.get(name, usual.get(name))
        if _listed(here) != _listed(there):
            yield f"{name} is {here} in {a.name}, and {there} in {b.name} ({_GENERATION})"


def _json(side: Side, name: str) -> Mapping[str, Any]:
    """A JSON file of a side; empty if it has none."""
    if side.folder is None or not (side.folder / name).is_file():
        return {}
    found = read_json(side.folder / name, allowed=INFINITIES, advice="copy the folder again")
    return found if isinstance(found, Mapping) else {}


def _listed(value: Any) -> Any:
    """One token id stands for a list of one."""
    return [value] if isinstance(value, int) and not isinstance(value, bool) else value
