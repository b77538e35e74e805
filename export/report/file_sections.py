"""What the sections of report.json on written files, and on plans, hold; see `sections.py`."""

from typing import Any

from pydantic import Field

from sparsepass.export.report.sections import Number, Part, is_number


class ArtifactSection(Part):
    """What `export` wrote."""

    target: str = Field(description="`onnx`, `hf`, `tensorrt` or `torch` so far")
    files: dict[str, int] = Field(description="file -> bytes, the evidence beside it left out")
    size_bytes: int = Field(description="sum of these")
    expected_sparse: dict[str, Any] = Field(
        description="file (empty: the folder) -> stored weight -> pattern; every other weight is dense on purpose"
    )
    axes: dict[str, Any] | None = Field(
        default=None, description="file -> stored weight -> axis along which the pattern runs, where the file does not tell"
    )
    dtype: str = Field(description="type of the written weights")
    notes: list[str] = Field(description="what a reader should know of the files")
    details: dict[str, Any] = Field(description="the target's own record")

    @property
    def num_sparse(self) -> int:
        """Stored weights that have to be sparse."""
        return sum(len(weights) for weights in self.expected_sparse.values())


class CheckEntry(Part):
    """A check of the written files."""

    name: str = Field(description="what was checked")
    held: bool | None = Field(default=None, description="whether it held; null if it could not be checked")
    summary: str = Field(description="what was found")
    details: dict[str, Any] = Field(description="the figures")


class VerificationSection(Part):
    """What was found when the written files were opened again."""

    held: bool | None = Field(default=None, description="whether every check held; null if verification was switched off")
    checks: list[CheckEntry] = Field(description="one entry a check")


class TensorEntry(Part):
    """A tensor of the samples."""

    shape: list[int] = Field(default=[], description="its shape")
    dtype: str = Field(default="", description="its type")


class SamplesSection(Part):
    """Inputs, and the outputs that the program gives for them, to check another runtime against."""

    file: str = Field(description="safetensors file with `inputs/NAME` and `outputs/NAME`")
    inputs: dict[str, TensorEntry] = Field(description="name -> shape and type")
    outputs: dict[str, TensorEntry] = Field(description="name -> shape and type, as the program gives them in torch")


class EngineEntry(Part):
    """An engine that was built."""

    name: str = Field(description="its name")
    file: str = Field(description="its file")
    targets: list[int] = Field(default=[], description="compute capabilities that it runs on")
    size_bytes: int = Field(description="size of the file")
    flag_requested: bool = Field(description="whether the builder was allowed to use sparse kernels")
    num_eligible: int | None = Field(default=None, description="layers that the log calls eligible")
    num_chosen: int | None = Field(default=None, description="layers that the log says run a sparse kernel")


class EvidenceEntry(Part):
    """What is known of one weight in one engine. Each state is `yes`, `no` or `unknown`."""

    engine: str = Field(description="name of the engine")
    layer: str = Field(description="name of the layer in the engine")
    weight: str = Field(description="name of the weight")
    shape: list[int] = Field(default=[], description="its shape")
    conforms: str = Field(description="whether the stored weight is sparse; `unknown` if it is dense on purpose")
    flag_requested: str = Field(description="whether the builder was allowed to use sparse kernels")
    eligible: str = Field(description="whether the builder found the layer fit for one")
    chosen: str = Field(description="whether the builder took one")
    ran_sparse: str = Field(description="what follows from the four states")
    reason: str = Field(description="why")
    dense_ms: Number | None = Field(default=None, description="measured time of a dense kernel")
    sparse_ms: Number | None = Field(default=None, description="measured time of a sparse kernel")


class TimesEntry(Part):
    """Measured times at one size."""

    batch: int = Field(description="sequences at once")
    sequence: int = Field(description="tokens in each")
    dense_ms: float = Field(description="time with dense kernels")
    sparse_ms: float = Field(description="time with sparse kernels")


class MeasuredEntry(Part):
    """What was measured of an engine on a GPU."""

    points: list[TimesEntry] = Field(description="one entry a size")
    break_even: str = Field(description="from which size on sparse kernels are faster, in words")


class SparsitySection(Part):
    """What is known of sparse kernels, from the targets `tensorrt` and `torch`.

    What the [four states](tensorrt.md#was-the-sparsity-used) mean, and [how torch chooses](torch.md#how-layers-are-chosen).
    """

    runtime: str = Field(
        description="what built the engines: `tensorrt`, `tensorrt-rtx` or `torch-tensorrt`; `torch` where torch itself runs "
        "the layers"
    )
    runtime_version: str = Field(description="its version")
    gpus: list[str] = Field(description="GPUs of the machine that built them; empty if it has none")
    engines: list[EngineEntry] = Field(
        description="one entry an engine; also `log`, `graph`, `profiles`, `num_layers` and `seconds`"
    )
    layers: list[EvidenceEntry] = Field(
        description="one entry for each weight in each engine; also `op`, `dtype`, `axis` and `tactic`"
    )
    counts: dict[str, Any] = Field(description="how often each state has each value, in `total` and engine by engine")
    measured: dict[str, MeasuredEntry] | None = Field(default=None, description="engine -> what was measured of it on a GPU")

    @property
    def meant(self) -> list[EvidenceEntry]:
        """The weights that are meant to be sparse."""
        return [layer for layer in self.layers if layer.conforms != "unknown"]


class StoredEntry(Part):
    """A stored weight that was looked at."""

    weight: str = Field(default="", description="name under which it is stored")
    verdict: str = Field(default="", description="such as `conforms`, `violates` or `left out`")
    reason: str = Field(default="", description="why")
    shape: list[int] = Field(default=[], description="shape as stored")
    axis: int | None = Field(default=None, description="axis along which groups were counted")
    required: bool = Field(default=False, description="whether it has to conform")
    num_groups: int = Field(default=0, description="groups along the axis")
    num_violations: int = Field(default=0, description="groups with too many entries that are not zero")
    num_nonzeros: int = Field(default=0, description="entries that are not zero")


class CauseEntry(Part):
    """What probably happened to weights that violate."""

    text: str = Field(default="", description="the cause")
    advice: str = Field(default="", description="what to do")


class StoredFileEntry(Part):
    """What was found in one file."""

    source: str = Field(description="the file")
    pattern: str = Field(description="the pattern asked for")
    conforms: bool = Field(description="whether it holds")
    counts: dict[str, int] = Field(description="verdict -> weights")
    causes: list[CauseEntry] = Field(default=[], description="likely causes of what was found")
    entries: list[StoredEntry] = Field(
        description="weight by weight; also `file`, `node`, `op`, `parameter`, `dtype`, and more of what was counted"
    )

    @property
    def said(self) -> str:
        """The verdict in words."""
        return f"{self.pattern} {'holds' if self.conforms else 'does NOT hold'}"


class PatternSection(Part):
    """What `sparsepass verify --report` found in stored weights."""

    conforms: bool = Field(description="whether the pattern holds in all files")
    reports: list[StoredFileEntry] = Field(description="one entry a file")


class PhaseEntry(Part):
    """Predicted times of prefill, or of decoding one token, in seconds."""

    dense_s: Number | None = Field(default=None, description="with dense weights")
    planned_s: Number | None = Field(default=None, description="as recommended")
    speedup: float = Field(description="dense time over planned time")


class WorkloadEntry(Part):
    """Predicted times of a workload."""

    batch: int = Field(description="sequences at once")
    seq: int = Field(description="tokens of the prompt")
    prefill: PhaseEntry = Field(description="times of the prompt")
    decode: PhaseEntry | None = Field(
        default=None, description="times of one more token; null for a model that does not decode"
    )


class LayerTimesEntry(Part):
    """Predicted times of a layer, in seconds."""

    dense_s: Number | None = Field(default=None, description="with a dense weight")
    sparse_s: Number | None = Field(default=None, description="with a 2:4 weight; null if no kernel takes it")

    @property
    def gain(self) -> float | None:
        """Dense time over 2:4 time; None if either is not known."""
        if is_number(self.dense_s) and is_number(self.sparse_s) and self.sparse_s > 0:
            return self.dense_s / self.sparse_s
        return None


class LayerPlanEntry(Part):
    """What is recommended for a layer."""

    name: str = Field(description="module path")
    weight: str | None = Field(default=None, description="name of its weight")
    out_features: int = Field(description="rows of the weight")
    in_features: int = Field(description="columns of the weight")
    num_experts: int = Field(default=1, description="matrices of this shape in the weight")
    decision: str = Field(description="`2:4` or `dense`")
    reason: str = Field(description="why")
    prefill: LayerTimesEntry | None = Field(default=None, description="times in prefill")
    decode: LayerTimesEntry | None = Field(default=None, description="times in decoding")


class MemoryEntry(Part):
    """Bytes of all linear layers' weights in one type."""

    dtype: str = Field(default="", description="the type")
    dense_bytes: Number = Field(default=0, description="all dense")
    planned_bytes: Number = Field(default=0, description="as recommended")
    everything_bytes: Number = Field(default=0, description="all 2:4")


class PlanSection(Part):
    """What `sparsepass plan --report` predicted; the content of its `--json`. [What the figures rest on](plan.md)."""

    model: str = Field(description="what was planned for")
    device: dict[str, Any] = Field(description="the GPU, with its figures")
    runtime: dict[str, Any] = Field(description="the model of its kernels")
    dtype: str = Field(description="type of the weights")
    pays: bool = Field(description="whether 2:4 is predicted to gain anything")
    points: list[WorkloadEntry] = Field(
        description="one entry a workload; also `new_tokens`, times of the `request`, and bytes of cache and of all"
    )
    memory: list[MemoryEntry] = Field(description="one entry a type of the weights")
    layers: list[LayerPlanEntry] = Field(description="one entry a layer; also intensities, and `pays_at`")
    ignore: list[str] = Field(description="layers to leave dense, as patterns for the passes")
    passes: str | None = Field(default=None, description="recommended passes; null if none pays")
    notes: list[str] = Field(description="what is not covered, and what was assumed")
