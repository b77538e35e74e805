"""The commands that run models and change nothing: `eval` and `compare`."""

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsepass.export.cli import support
from sparsepass.export.cli.options import Fields
from sparsepass.export.cli.output import complain, print_json, say, show, stdout
from sparsepass.export.stages import Evaluation, ModelSource

if TYPE_CHECKING:
    from torch import Tensor

    Sides = list[tuple[str, Any, Any]]
_LOG = logging.getLogger(__name__)
_TOKENS = 128
_MODEL_FILES = ("model.safetensors", "model.safetensors.index.json")


def eval_command(
    model: support.Model,
    *,
    evaluation: Annotated[
        Evaluation | None, Fields(left_out=("batch_size",), help={"text": support.DATA["data"]}, repeated=("text",))
    ],
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", min=1, help="Windows (or lm-eval requests) at once: speed only.")
    ] = None,
    tasks: Annotated[
        list[str] | None, typer.Option("--tasks", help="lm-eval tasks, separated by commas. Needs the package lm-eval.")
    ] = None,
    include_path: Annotated[Path | None, typer.Option("--include-path", help="Folder with task files of your own.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Use only so many documents of each task.")] = None,
    num_fewshot: Annotated[int | None, typer.Option("--num-fewshot", min=0, help="Examples before each question.")] = None,
    device: support.Device = "auto",
    as_json: support.AsJson = False,
) -> None:
    """Measure the perplexity of MODEL on a text, or run lm-eval tasks, or both.

    Figures compare only at the same text, context, stride, BOS setting and tokenizer, so all of these are printed.
    """
    from sparsepass.export.stages import check_tasks, lm_eval_tasks
    from sparsepass.graph import SparsepassError
    from sparsepass.graph.support import find_device

    names = [name.strip() for item in tasks or () for name in item.split(",") if name.strip()]
    of_tasks = {"--include-path": include_path, "--limit": limit, "--num-fewshot": num_fewshot}
    if not names and (vain := [flag for flag, value in of_tasks.items() if value is not None]):
        raise SparsepassError(f"{', '.join(vain)} would change nothing, because --tasks was not given; give it too")
    if evaluation is None and not names:
        raise SparsepassError("nothing to measure: give --text FILE (or --text python-docs), or --tasks NAME")
    if evaluation is not None:
        evaluation.check()
    if names:
        check_tasks(names, include_path=include_path)
    place = find_device(device)
    loaded = model.load()
    _note_adapter(model.source)
    document: dict[str, Any] = {"model": model.source}
    if evaluation is not None:
        found = dataclasses.replace(evaluation, batch_size=batch_size).measure(loaded.model, loaded.tokenizer, place)
        document["perplexity"] = dataclasses.asdict(found) | {"text": evaluation.text}
        if not as_json:
            stdout().print(f"{model.source}: {found}", highlight=False)
    if names:
        document["lm_eval"] = lm_eval_tasks(
            loaded.model,  # type: ignore[arg-type]
            loaded.tokenizer,  # type: ignore[arg-type]
            names,
            include_path=include_path,
            limit=limit,
            batch_size=batch_size or 1,
            num_fewshot=num_fewshot,
            device=place,
        )
        if not as_json:
            show(_task_table(document["lm_eval"]))
    if as_json:
        print_json("eval", document)


def compare_command(
    a: Annotated[
        str,
        typer.Argument(
            metavar="A",
            help="The reference: model folder, hub id, .gguf, saved program, .onnx file.",
            show_default=False,
        ),
    ],
    b: Annotated[str, typer.Argument(metavar="B", help="What is compared with it.", show_default=False)],
    inputs: Annotated[
        Path | None, typer.Option("--inputs", help="Safetensors file: input name -> tensor, or a samples file.")
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option("--text", help="Text to tokenize as the input: as that of eval. May be repeated, for several files."),
    ] = None,
    text_column: Annotated[
        str | None,
        typer.Option("--text-column", help="Column of the rows that holds text; by default text, or else chats in messages."),
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=2, help="Tokens of --text to use.")] = _TOKENS,
    atol: Annotated[float | None, typer.Option("--atol", help="Bound of the largest absolute difference.")] = None,
    rtol: Annotated[
        float | None,
        typer.Option("--rtol", help="Bound of each output's relative error; by default, where no bound is given, the dtype's."),
    ] = None,
    max_kl: Annotated[float | None, typer.Option("--max-kl", help="Bound of the KL divergence of the logits, in nats.")] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Demand equal numbers.")] = False,
    no_layers: Annotated[
        bool, typer.Option("--no-layers", help="Compare outputs only, and do not look for the layer where they part.")
    ] = False,
    gguf_file: support.GgufFile = None,
    trust_remote_code: support.TrustRemoteCode = False,
    as_json: support.AsJson = False,
) -> None:
    """Run A and B on the same inputs, and tell how far apart they are and at which layer they part.

    Without --inputs and --text the samples beside an export are used, or small random inputs. If no bound is given, the
    relative error of each output may be 1e-5 in float32, 5e-3 in float16 and 3e-2 in bfloat16; if one is, it alone counts.

    Exit code: 0 equivalent within the bounds, 1 not, 2 wrong usage or unreadable input.
    """
    from sparsepass.graph import SparsepassError
    from sparsepass.graph.equivalence import compare

    if inputs is not None and text:
        raise SparsepassError("--inputs and --text were both given; choose one")
    of_text = {"--tokens": tokens != _TOKENS, "--text-column": text_column is not None}
    if not text and (vain := [flag for flag, is_given in of_text.items() if is_given]):
        raise SparsepassError(f"{', '.join(vain)} would change nothing, because --text was not given; give it too")
    wanted = Evaluation(text=text, text_column=text_column, max_tokens=tokens) if text else None
    if wanted is not None:
        wanted.check()
    if inputs is not None and not inputs.is_file():
        raise SparsepassError(f"--inputs {inputs} does not exist; name a safetensors file")
    for name in dict.fromkeys((a, b)):
        if not _is_onnx(name):
            ModelSource(source=name, gguf_file=gguf_file, trust_remote_code=trust_remote_code).check()
    sides = []
    for name in dict.fromkeys((a, b)):
        opened, tokenizer = _open(name, gguf_file=gguf_file, trust_remote_code=trust_remote_code)
        sides.append((name, opened, tokenizer))
    _LOG.info("comparing")
    found = compare(sides[0][1], sides[-1][1], _inputs(sides, inputs, wanted), layers=not no_layers)
    failures = [*found.failures(atol=atol, rtol=rtol, max_kl=max_kl, exact=exact), *_beside(sides)]
    code = support.FAILED if failures else support.HELD
    if as_json:
        document = {"equivalent": not failures, "failures": failures, "a": a, "b": b, **found.to_dict()}
        print_json("compare", document, exit_code=code)
    else:
        stdout().print(str(found), highlight=False, markup=False)
        for failure in failures:
            complain(failure)
        if not failures:
            stdout().print("Equivalent on these inputs.", style="green", highlight=False)
    support.finish(code)


def _beside(sides: "Sides") -> "tuple[str, ...]":
    """How the sides differ beside their numbers."""
    from sparsepass.export.stages import Side, companion_differences

    found = []
    for name, opened, tokenizer in (sides[0], sides[-1]):
        path = Path(name).expanduser()
        folder = path if path.is_dir() else path.parent if path.is_file() and path.suffix == ".onnx" else None
        found.append(Side(name=name, folder=folder, model=opened, tokenizer=tokenizer))
    return companion_differences(*found)


def _open(name: str, *, gguf_file: str | None, trust_remote_code: bool) -> "tuple[Any, Any]":
    """What `compare` takes for a name, and its tokenizer if it comes with one."""
    from sparsepass.graph.load import load_model

    if _is_onnx(name):
        return Path(name).expanduser(), None
    _LOG.info("loading %s", name)
    loaded = load_model(name, gguf_file=gguf_file, trust_remote_code=trust_remote_code)
    _note_adapter(name)
    return loaded.model, loaded.tokenizer


def _is_onnx(name: str) -> bool:
    """Whether `compare` runs a name as an ONNX file: one, or a folder that holds one and no model."""
    from sparsepass.graph.saved import PROGRAM_FILE

    path = Path(name).expanduser()
    is_folder = path.is_dir() and any(path.glob("*.onnx")) and not any((path / file).is_file() for file in _MODEL_FILES)
    return (path.suffix == ".onnx" or is_folder) and not (path / PROGRAM_FILE).is_file()


def _inputs(sides: "Sides", file: Path | None, text: Evaluation | None) -> "dict[str, Tensor]":
    """Inputs for a comparison: what the user gave, else samples beside an artifact, else a model's example inputs."""
    from torch import nn

    from sparsepass.export.stages import SAMPLES_FILE, read_samples
    from sparsepass.graph import Program, SparsepassError
    from sparsepass.graph.capture import example_inputs_for

    if file is not None:
        return read_samples(file)
    if text is not None:
        return _tokenized(sides, text)
    for name, opened, _ in sides:
        place = Path(name).expanduser()
        samples = (place if place.is_dir() else place.parent) / SAMPLES_FILE
        if samples.is_file():
            return read_samples(samples)
        if isinstance(opened, Program):
            return opened.example_inputs
    for _, opened, _ in sides:
        if isinstance(opened, nn.Module):
            return example_inputs_for(opened)
    raise SparsepassError(
        "no inputs are known for these files: give --inputs FILE.safetensors (input name -> tensor), or --text FILE "
        "if a tokenizer lies beside one of them"
    )


def _tokenized(sides: "Sides", text: Evaluation) -> "dict[str, Tensor]":
    import torch

    from sparsepass.graph import SparsepassError
    from sparsepass.graph.load import tokenizer_in
    from sparsepass.graph.texts import first_ids
    from sparsepass.passes.data import special_frame

    tokenizer = next((tokenizer for _, _, tokenizer in sides if tokenizer is not None), None)
    for name, _, _ in sides if tokenizer is None else ():
        place = Path(name).expanduser()
        place = place if place.is_dir() else place.parent
        if (place / "tokenizer_config.json").is_file():
            tokenizer = tokenizer_in(place, name)
            break
    if tokenizer is None:
        raise SparsepassError("--text needs a tokenizer, and none lies beside either side; give --inputs FILE.safetensors")
    ids = first_ids(text.content(), tokenizer, text.max_tokens, what="text", column=text.text_column)
    before, after = special_frame(tokenizer)
    ids = [*before, *ids, *after][: text.max_tokens]
    if len(ids) < 2:
        raise SparsepassError(f"the text {text.name} gives {len(ids)} tokens; give at least two")
    return {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}


def _note_adapter(name: str) -> None:
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file() and (folder / "adapter" / "adapter_config.json").is_file():
        say(f"Note: {name} is taken without the SLoRB branches in its adapter/; load that with peft to have them.")


def _task_table(found: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(title=f"lm-eval {found['lm_eval']}", title_justify="left", show_edge=False)
    for heading in ("task", "metric", "value"):
        table.add_column(heading)
    for name, results in found["results"].items():
        for metric, value in results.items():
            if isinstance(value, int | float) and not metric.startswith(("alias", "sample")):
                table.add_row(name, metric, f"{value:.4f}")
    return table
