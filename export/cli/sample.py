"""The command `sample`."""

from pathlib import Path
from typing import Annotated

import typer

from sparsepass.export.cli import support


def sample_command(
    model: support.DenseModel,
    *,
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", help="File to write, ending in .jsonl: rows of `input_ids` and `text`.", show_default=False
        ),
    ],
    tokens: Annotated[int, typer.Option("--tokens", min=2, help="Tokens to sample.", show_default=False)],
    length: Annotated[
        int, typer.Option("--length", min=2, help="Tokens of a sequence: at least the context that is trained with.")
    ] = 512,
    start: Annotated[
        str | None,
        typer.Option(
            "--start",
            help="What each sequence starts from; by default the token that begins a document. "
            "That of a chat model begins a chat; SmolLM2-Instruct, for one, writes documents from '<|endoftext|>'.",
            show_default=False,
        ),
    ] = None,
    temperature: Annotated[float, typer.Option("--temperature", help="1 samples what the model was trained to say.")] = 1.0,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Sequences at once.")] = 32,
    seed: Annotated[int, typer.Option("--seed", help="Of the draws.")] = 0,
    device: Annotated[
        str | None, typer.Option("--device", help="Such as cuda; by default the GPU, where there is one.", show_default=False)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that stands at --out, and begin anew.")] = False,
) -> None:
    """Let a model write text itself, for `retrain` to distil from: where there is no text, or none broad enough.

    Started again after an interruption, with the same options, it goes on where it stopped.

    Exit code: 0 done, 2 wrong usage or unreadable input.
    """
    import torch

    from sparsepass.graph import SparsepassError
    from sparsepass.retrain.teacher import SampleConfig, check_file, sample_to_file

    check_file(out, force=force, inputs=[model.source])
    config = SampleConfig(
        num_tokens=tokens, length=length, start=start, batch_size=batch_size, temperature=temperature, seed=seed
    )
    loaded = model.load(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if loaded.tokenizer is None:
        raise SparsepassError(f"{model.source} has no tokenizer, and what it samples is written as text; give one that has")
    sample_to_file(loaded.model, loaded.tokenizer, out, config, force=force, progress=True)
    support.stdout().print(f"wrote {out}: train on it with --data {out}", highlight=False)
