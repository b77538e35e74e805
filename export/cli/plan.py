"""The command `plan`."""

from typing import Annotated

import typer

from sparsepass.export.cli import support
from sparsepass.export.cli.output import print_json, show
from sparsepass.export.cli.report import AddTo, add_to, check_report


def plan_command(
    model: support.ModelWithoutWeights,
    gpu: Annotated[
        str,
        typer.Option(
            "--gpu",
            help="GPU to plan for, such as rtx4090, a100, l40s or h100; cpu is this machine's processor.",
            show_default=False,
        ),
    ],
    runtime: Annotated[
        str | None,
        typer.Option(
            "--runtime",
            help="Model of the kernels: ideal, tensorrt-llm (the default) or torch; for cpu, packed.",
        ),
    ] = None,
    batch: Annotated[
        list[str] | None, typer.Option("--batch", help="Sequences at once: 1, or 1,8,32. May be repeated. By default 1.")
    ] = None,
    seq: Annotated[
        list[str] | None,
        typer.Option("--seq", help="Prompt lengths: 512, or 512,4096. May be repeated. By default 2048 or the model's limit."),
    ] = None,
    new_tokens: Annotated[int, typer.Option("--new-tokens", help="Tokens generated for each prompt.")] = 128,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="Weights: bf16, fp16, fp8, int8 or int4. By default the model's, or bf16.")
    ] = None,
    slorb: Annotated[int, typer.Option("--slorb", help="Plan SLoRB branches of this k; 0 for none.")] = 0,
    projection: Annotated[str, typer.Option("--projection", help="Of the SLoRB branches: fixed or trainable.")] = "fixed",
    min_gain: Annotated[float, typer.Option("--min-gain", help="Least speedup of a layer that is worth making it 2:4.")] = 1.02,
    show_all: Annotated[bool, typer.Option("--all", help="One row for each layer, and not for each shape.")] = False,
    gguf_file: support.GgufFile = None,
    report: AddTo = None,
    as_json: support.AsJson = False,
) -> None:
    """Predict what 2:4 sparsity gains for MODEL on a GPU or on this processor, and which layers to leave dense.

    A roofline with the vendor's figures and published efficiencies of the runtime: a forecast, not a measurement. For cpu, with
    the bandwidth that is measured here.

    Exit code: 0 it pays for at least one layer, 1 it does not pay, 2 wrong usage or unreadable input.
    """
    import time

    from sparsepass.export.plan import plan

    check_report(report)
    started = time.perf_counter()
    found = plan(
        model,
        gpu=gpu,
        runtime=runtime,
        batches=support.numbers("--batch", batch) or (1,),
        seqs=support.numbers("--seq", seq),
        new_tokens=new_tokens,
        dtype=dtype,
        slorb_k=slorb,
        projection=support.projection(projection),
        min_gain=min_gain,
        gguf_file=gguf_file,
    )
    code = support.HELD if found.pays else support.FAILED
    if as_json:
        print_json("plan", found.to_dict(), exit_code=code)
    else:
        from sparsepass.export.plan import page

        show(page(found, every_layer=show_all))
    add_to(report, "plan", {"plan": found.to_dict()}, started)
    support.finish(code)
