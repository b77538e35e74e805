"""What `sparsepass bench` measured, as a section of report.json; its view is in `section_views.py`."""

from collections.abc import Iterator

from pydantic import Field

from sparsepass.export.report.parts import Number, Part, is_number


class SideEntry(Part):
    """A model that was measured."""

    name: str = Field(description="what it is called in the tables")
    source: str = Field(description="what the user named: folder, hub id, file")
    architecture: str = Field(description="the model's class")
    dtype: str = Field(description="type of the weights as loaded, packed ones apart")
    num_packed: int = Field(description="linear layers that run packed")
    num_dense: int = Field(description="linear layers that run dense")
    kernels: dict[str, int] = Field(
        default={},
        description="kernel -> packed layers: `amx`, `avx512`, `avx2`, `generic`, `triton`, or `torch` for none of ours",
    )
    dense: dict[str, int] = Field(default={}, description="why layers run dense -> layers, as far as the folder's report tells")
    disk_bytes: int = Field(description="bytes of its files with weights")
    loaded_bytes: int | None = Field(
        default=None, description="growth of resident memory from before loading to after, with all weights read once"
    )
    running_bytes: int | None = Field(default=None, description="the most that it grew by while it read a prompt and generated")
    loading_bytes: int | None = Field(
        default=None,
        description="the most that it grew by while loading, with pages of mapped files, which the system takes back",
    )

    @property
    def runs_packed(self) -> bool:
        """Whether a kernel made for it multiplies packed layers."""
        return any(count for kernel, count in self.kernels.items() if kernel != "torch")

    @property
    def said(self) -> str:
        """Which kernels ran, in a sentence."""
        total = self.num_packed + self.num_dense
        named = ", ".join(f"kernel {kernel} for {count}" for kernel, count in self.kernels.items())
        packed = f"{self.num_packed} of {total} linear layers packed ({named})"
        said = packed if self.num_packed else f"all {total} linear layers dense"
        reasons = "; ".join(f"{count} dense: {reason}" for reason, count in self.dense.items())
        return f"{said}, {self.dtype}" + (f". {reasons}" if reasons else "")


class RateEntry(Part):
    """What one model did in one measurement: medians."""

    prompt_tokens_per_second: Number = Field(description="tokens of all prompts, by the time to the first token")
    first_token_s: Number | None = Field(default=None, description="seconds to the first token; null without generation")
    new_tokens_per_second: Number | None = Field(
        default=None, description="tokens of all sequences after the first; null if there are none"
    )
    spread: Number | None = Field(default=None, description="slowest less fastest run, by the median")


class SpeedPointEntry(Part):
    """A measurement."""

    phase: str = Field(description="`decode`, `prefill`, or `forward` for a model that does not generate")
    batch: int = Field(description="sequences at once")
    prompt_tokens: int = Field(description="tokens of each prompt")
    new_tokens: int = Field(description="tokens generated for each; 0 for `forward`")
    results: list[RateEntry] = Field(description="one entry a model, in the order of `sides`")

    @property
    def rates(self) -> list[float]:
        """Tokens a second of what the phase is about, one figure a model."""
        wanted = "new_tokens_per_second" if self.phase == "decode" else "prompt_tokens_per_second"
        found = (getattr(result, wanted) for result in self.results)
        return [float(rate) for rate in found if is_number(rate)]

    @property
    def gain(self) -> float | None:
        """The first model's rate by the second's; None if there is no second one."""
        rates = self.rates
        return rates[0] / rates[1] if len(rates) > 1 and rates[1] else None

    @property
    def said(self) -> str:
        """What it is, in a few words."""
        named = {"decode": "decoding", "prefill": f"prefill of {self.prompt_tokens} tokens"}
        return f"{named.get(self.phase, f'forward pass, {self.prompt_tokens} tokens')}, batch {self.batch}"


class SpeedSection(Part):
    """What `sparsepass bench` measured: times, memory and size of a model, and of another one beside it."""

    sides: list[SideEntry] = Field(description="the model, and the one that it was compared with")
    points: list[SpeedPointEntry] = Field(description="one entry a measurement")
    device: str = Field(description="where it ran: `cpu` or a GPU's name")
    processor: str = Field(default="", description="the processor, with the instructions that kernels use")
    threads: int = Field(description="threads that torch computed with")
    repeats: int = Field(description="timed runs of each measurement, the models taking turns")

    @property
    def place(self) -> str:
        """Where it was measured, in words."""
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return f"{self.processor or 'cpu'}; {threads}" if self.device == "cpu" else self.device

    @property
    def main(self) -> SpeedPointEntry | None:
        """What tells most: decoding with the fewest sequences, or else the first measurement."""
        decoding = [point for point in self.points if point.phase == "decode"]
        return min(decoding, key=lambda point: point.batch) if decoding else next(iter(self.points), None)

    def rows(self) -> Iterator[tuple[str, list[float], str]]:
        """What is measured -> its value for each model, and what kind of figure it is: `rate`, `seconds` or `bytes`."""
        for point in self.points:
            yield f"{point.said}: tokens a second", point.rates, "rate"
            if point.phase == "prefill":
                waits = [result.first_token_s for result in point.results if is_number(result.first_token_s)]
                yield f"time to first token, {point.prompt_tokens} tokens", waits, "seconds"
        for said, field in (
            ("memory, loaded", "loaded_bytes"),
            ("memory, at most while running", "running_bytes"),
            ("memory, at most while loading, mapped files counted", "loading_bytes"),
            ("size on disk", "disk_bytes"),
        ):
            known = [getattr(side, field) for side in self.sides]
            if None not in known:
                yield said, known, "bytes"
