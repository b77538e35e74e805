"""What the sections of report.json hold, as models: the checks, the JSON schema and docs/report.md come from them.

A field without a default has to be there. A field with one may be missing: earlier versions did not write it, or it does not
apply. Fields that no model names are kept as they are. The sections on files and plans are in `file_sections.py`.
"""

import math
from typing import Annotated, Any, TypeGuard

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

_TEXTS = ("inf", "-inf", "nan")


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a finite figure, and not one of the texts inf, -inf and nan."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _number(value: object) -> object:
    if (isinstance(value, int | float) and not isinstance(value, bool)) or value in _TEXTS:
        return value
    raise PydanticCustomError("number_type", "expected a number, or one of the texts inf, -inf and nan")


Number = Annotated[
    int | float | str,
    PlainValidator(_number),
    WithJsonSchema({"anyOf": [{"type": "number"}, {"type": "string", "enum": list(_TEXTS)}]}),
]
"""A figure. JSON has no infinities and no NaN, so these are texts."""


class Part(BaseModel):
    """A section of a report, or an entry of one. It keeps the fields that it does not know. Abstract."""

    model_config = ConfigDict(extra="allow", populate_by_name=True)


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
    files: dict[str, Any] | None = Field(default=None, description="file of weights -> bytes")
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
    relative_error: Number | None = Field(
        default=None, description="error of the outputs, relative to the outputs before the pass"
    )
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
    kept_norm: Number | None = Field(
        default=None, description="of learned masks: share of the weights' squared norm that is kept"
    )
    curve: dict[str, list[Any]] = Field(
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
