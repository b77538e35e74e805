"""What the sections of report.json hold, as models: the checks, the JSON schema and docs/report.md come from them.

A field without a default has to be there. A field with one may be missing: earlier versions did not write it, or it does not
apply. Fields that no model names are kept as they are.
"""

from typing import Annotated, Any, Final

from pydantic import AfterValidator, Field, TypeAdapter
from typing_extensions import TypedDict  # pydantic takes no other before Python 3.12

from sparsepass.export.report.parts import Number, Part, is_number


class ModelSection(Part):
    """What the passes were applied to."""

    source: str = Field(description="what the user named: folder, hub id, file")
    kind: str = Field(description="`folder`, `hub`, `gguf`, `program` or `memory`")
    class_: str | None = Field(default=None, alias="class", description="the model's class")
    dtype: str = Field(description="type of the weights as loaded")
    num_parameters: int = Field(description="parameters, tied ones counted once")
    revision: str | None = Field(default=None, description="of a model from the hub, as the user named it")
    commit: str | None = Field(default=None, description="the commit that this was")
    gguf_file: str | None = Field(default=None, description="name of the GGUF file in the folder or repository")
    files: dict[str, int] | None = Field(default=None, description="file of weights -> bytes")
    notes: list[str] | None = Field(default=None, description="what a reader should know of the loading")


class OutcomeEntry(Part):
    """What a pass did at a layer."""

    site: str = Field(default="", description="module path of the layer")
    weight: str = Field(default="", description="name of its weight")
    shape: list[int] = Field(default=[], description="shape of the weight as stored")
    action: str = Field(default="", description="`rewritten` or `skipped`")
    reason: str = Field(default="", description="why it was skipped")
    facts: dict[str, Any] = Field(default={}, description="what the pass measured")


class CalibrationEntry(Part):
    """What a pass was calibrated on."""

    source: str = Field(default="", description="name of the text or data set")
    num_sequences: Number | None = Field(default=None, description="sequences used")
    num_tokens: Number | None = Field(default=None, description="tokens used")


class OutputsEntry(Part):
    """How far a pass moved the model's outputs."""

    inputs: str | None = Field(default=None, description="what the model was run on")
    relative_error: Number | None = Field(default=None, description="error relative to the outputs before the pass")
    kl: Number | None = Field(default=None, description="Kullback-Leibler divergence of the next-token probabilities")


class PassEntry(Part):
    """What a pass did."""

    text: str = Field(description="the pass with all its options")
    promise: str = Field(description="`exact` or `approximate`")
    outcomes: list[OutcomeEntry] = Field(description="layer by layer: what was done, why not, measured facts")
    validation: OutputsEntry | None = Field(default=None, description="how far the outputs moved")
    calibration: CalibrationEntry | None = Field(default=None, description="the text or tensors that were used")
    seconds: Number = Field(description="wall time, without validation")

    @property
    def name(self) -> str:
        """The pass without its options."""
        return self.text.partition("{")[0]

    @property
    def num_rewritten(self) -> int:
        """Layers that it changed."""
        return sum(outcome.action == "rewritten" for outcome in self.outcomes)


class LayerEntry(Part):
    """A sparse layer."""

    pattern: str = Field(default="", description="such as `2:4`")
    zeros: Number | None = Field(default=None, description="counted share of zeros, from 0 to 1, as the passes left it")
    branch_k: int | None = Field(default=None, description="k of its SLoRB branch, if it has one")


class PassesSection(Part):
    """What each pass did at each layer; the content of `Program.report().to_dict()`."""

    num_sites: int = Field(description="linear layers found")
    num_sparse: int = Field(description="of these, how many are N:M sparse now")
    skipped: dict[str, str] = Field(description="layer -> why it is not sparse; every layer that is not is in it")
    passes: list[PassEntry] = Field(description="one entry a pass, in the order they ran")
    quantized: dict[str, str] | None = Field(
        default=None, description="quantized layer -> its grid, such as `int4, groups of 64`"
    )
    layers: dict[str, LayerEntry] | None = Field(default=None, description="sparse layer -> its pattern and zeros")


class TeacherEntry(Part):
    """What a program was trained to follow."""

    kind: str = Field(default="", description="`model`, `CachedTeacher` or `none`")
    source: str | None = Field(default=None, description="what the user named")
    class_: str | None = Field(default=None, alias="class", description="class of a model")
    fingerprint: Any = Field(default=None, description="what tells a model from others")


class TextEntry(Part):
    """A text that was trained or validated on."""

    source: str | None = Field(default=None, description="what the user named")
    epochs: Number | None = Field(default=None, description="how often the training read it")


class TrainingTextsEntry(Part):
    """The texts of a training."""

    train: TextEntry | None = Field(default=None, description="what it learned from")
    validation: TextEntry | None = Field(default=None, description="what it was measured on")


class ValidationEntry(Part):
    """A measurement on held-out text during a training; the first one is that of step 0."""

    step: int = Field(default=0, description="steps done")
    nll: Number | None = Field(default=None, description="mean negative log-likelihood of a token, in nats")
    perplexity: Number = Field(default="nan", description="its exponential")
    kl: Number | None = Field(default=None, description="divergence from the teacher; null without one in memory")
    num_tokens: Number | None = Field(default=None, description="tokens scored")


class TrainingEntry(Part):
    """One time that the program was trained."""

    method: str = Field(description="how the masks were treated")
    settings: dict[str, Any] = Field(description="all settings of the training")
    num_steps: int = Field(description="steps done")
    num_tokens: int = Field(description="tokens trained on")
    seconds: Number = Field(description="wall time of the training")
    tokens_per_second: Number = Field(description="speed of the training")
    step_of_weights: int = Field(description="the step whose weights were kept")
    teacher: TeacherEntry = Field(description="what it followed")
    data: TrainingTextsEntry = Field(description="sources, tokens and epochs")
    validations: list[ValidationEntry] = Field(description="measurements on held-out text")
    flips_since_first: Number = Field(description="share of all mask entries of these weights that differ from the first mask")
    flips_by_layer: dict[str, Number] = Field(description="the same, weight by weight")
    decided: Number | None = Field(default=None, description="of learned masks: share of groups with a probability above 0.99")
    kept_norm: Number | None = Field(default=None, description="of learned masks: kept share of the weights' squared norm")
    curve: dict[str, list[Number | None]] = Field(
        description="column -> at most 200 values: `step`, `tokens`, `lr`, `decay`, `flips_since_first` and `memory_bytes` as "
        "they stood at the end of each piece of the run; `loss`, `kl`, `ce`, `grad_norm`, `flip_rate` and `tokens_per_second` "
        "as means over it"
    )


class RetrainingSection(Part):
    """What each training did, in the order of the trainings. `report.md` draws it into `figures/`.

    [What the figures mean](retrain.md#what-the-figures-mean).
    """

    runs: list[TrainingEntry] = Field(description="one entry for each time the program was trained")


class MeasurementEntry(Part):
    """A perplexity, and how it was measured."""

    name: str = Field(description="`dense`, `2:4`, ...")
    perplexity: Number = Field(description="exponential of `nll_mean`")
    nll_mean: Number | None = Field(default=None, description="mean negative log-likelihood of a token, in nats")
    num_tokens: int = Field(description="tokens scored")
    context: int = Field(description="tokens in a window")
    stride: int = Field(description="tokens between the beginnings of two windows")
    bos: bool = Field(description="whether each window begins with the BOS token")
    dtype: str = Field(description="type that was computed in")
    seconds: Number | None = Field(default=None, description="wall time")

    @property
    def setting(self) -> tuple[object, ...]:
        """What has to be the same for two perplexities to stand side by side."""
        return self.num_tokens, self.context, self.stride, self.bos, self.dtype


class AccuracySection(Part):
    """Perplexities, if an evaluation text was given (`--eval-text`). The first entry is what the others are compared with."""

    text: str = Field(description="name of the evaluation text")
    measurements: list[MeasurementEntry] = Field(description="all of one text and setting, so that they compare")


class ArtifactSection(Part):
    """What `export` wrote."""

    target: str = Field(description="its name in the table of targets, such as `onnx`")
    files: dict[str, int] = Field(description="file -> bytes, the evidence beside it left out")
    size_bytes: int = Field(description="sum of these")
    expected_sparse: dict[str, dict[str, str]] = Field(
        description="file (empty: the folder) -> stored weight -> pattern; every other weight is dense on purpose"
    )
    axes: dict[str, dict[str, int]] | None = Field(
        default=None, description="file -> weight -> axis of the pattern, if the file lacks it"
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
    decides: bool = Field(default=True, description="whether the whole is not checked if this could not be checked")


class VerificationSection(Part):
    """What was found when the written files were opened again."""

    held: bool | None = Field(default=None, description="whether every check held; null if one could not be made, or none was")
    state: str = Field(default="", description="the same in words: `held`, `did_not_hold` or `not_checked`")
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


class _StateCounts(TypedDict, total=False):
    """How often each state has each value."""

    total: dict[str, dict[str, int]]
    engines: dict[str, dict[str, dict[str, int]]]


_STATE_COUNTS: Final = TypeAdapter(_StateCounts)


def _checked_counts(value: dict[str, Any]) -> dict[str, Any]:
    _STATE_COUNTS.validate_python(value, strict=True)
    return value


class SparsitySection(Part):
    """What is known of sparse kernels, from the targets `tensorrt`, `torch` and `packed`.

    What the [four states](tensorrt.md#was-the-sparsity-used) mean, and [how torch chooses](torch.md#how-layers-are-chosen).
    """

    runtime: str = Field(
        description="what built the engines: `tensorrt`, `tensorrt-rtx` or `torch-tensorrt`; `torch` where torch itself runs "
        "the layers, `sparsepass` where its own kernels do"
    )
    runtime_version: str = Field(description="its version")
    gpus: list[str] = Field(description="GPUs of the machine that built them; empty if it has none")
    engines: list[EngineEntry] = Field(description="each engine; also `log`, `graph`, `profiles`, `num_layers` and `seconds`")
    layers: list[EvidenceEntry] = Field(description="each weight in each engine; also `op`, `dtype`, `axis` and `tactic`")
    counts: Annotated[dict[str, Any], AfterValidator(_checked_counts)] = Field(
        description="how often each state has each value, in `total` and engine by engine"
    )
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
    decode: PhaseEntry | None = Field(default=None, description="times of one more token; null if the model does not decode")


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
    device: dict[str, Any] = Field(description="the GPU or processor, with its figures")
    runtime: dict[str, Any] = Field(description="the model of its kernels")
    dtype: str = Field(description="type of the weights")
    pays: bool = Field(description="whether 2:4 is predicted to gain anything")
    points: list[WorkloadEntry] = Field(description="each workload; also `new_tokens`, `request`, `cache_bytes`, `needs_bytes`")
    memory: list[MemoryEntry] = Field(description="one entry a type of the weights")
    layers: list[LayerPlanEntry] = Field(description="one entry a layer; also intensities, and `pays_at`")
    ignore: list[str] = Field(description="layers to leave dense, as patterns for the passes")
    passes: str | None = Field(default=None, description="recommended passes; null if none pays")
    notes: list[str] = Field(description="what is not covered, and what was assumed")
