"""A recipe: one file for the whole way of a model, checked as a whole before anything runs.

Its sections are the stages, in the order in which they run: ``prune``, ``retrain``, ``eval``, ``export``, ``measure``. Each
section is a dataclass here or one of the library's own (``train``, ``data``, a target), so that a setting has one name
everywhere.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

from sparsepass.export.stages.exporting import OLD_GROUPS, refuse_option
from sparsepass.export.stages.measuring import MeasureSection
from sparsepass.export.stages.settings import BenchSettings, Calibration, Evaluation, ModelSource, inputs_of
from sparsepass.export.stages.yaml_settings import override, parse_settings, read_recipe_text, refuse_unknown
from sparsepass.export.targets import Target, parse_target, targets_table
from sparsepass.graph.load import parse_dtype
from sparsepass.graph.saved import PROGRAM_FILE
from sparsepass.graph.support import SparsepassError, check_writable
from sparsepass.passes import Pass, parse_pipeline
from sparsepass.passes.conditions import Condition
from sparsepass.passes.data import PYTHON_DOCS, locate
from sparsepass.passes.manager import resolved
from sparsepass.retrain.config import RetrainConfig, read_settings
from sparsepass.retrain.data import DataConfig
from sparsepass.retrain.grids import check_quantize
from sparsepass.retrain.teacher import SampleConfig

ORDER: Final = ("model", "out", "prune", "retrain", "eval", "export", "measure")
"""Keys of a recipe, in the order in which they run, whatever the order in the file."""

_TEXT_FORMS = f"a text file (.txt, .jsonl, .parquet), a folder, the name of a hub data set, or {PYTHON_DOCS}"
Kind = TypeVar("Kind")


@dataclass(frozen=True, kw_only=True)
class PruneSection:
    """What `sparsepass prune` does.

    In a recipe the settings of the calibration stand beside the passes, and its data is named ``calibration``.

    Attributes:
        passes: Passes in order, as one text or a list of texts.
        calibration: What they are calibrated on; without data nm_sparsify goes by magnitude.
        validate: Whether to measure after each pass how far the outputs moved.
    """

    passes: str | tuple[str, ...] = "nm_sparsify"
    calibration: Calibration = field(default_factory=Calibration)
    validate: bool = True

    @property
    def settings(self) -> dict[str, Any]:
        """The section as a recipe has it, and as ``stages.json`` holds it."""
        calibration = dataclasses.asdict(self.calibration)
        return {"calibration": calibration.pop("data"), **calibration, "passes": self.passes, "validate": self.validate}


@dataclass(frozen=True, kw_only=True)
class RetrainSection:
    """What `sparsepass retrain` does.

    Attributes:
        train: How it is trained.
        data: What it is trained on.
        teacher: The dense model: folder, hub id or .gguf file; by default the one that was pruned.
        teacher_dtype: Type in which its weights are loaded.
        teacher_cache: Folder for its top-k logits: written once, and then it is not in memory while the student trains.
        teacher_k: Logits kept for each token.
        sample: Text that the teacher writes before the training, mixed in as ``data.beside`` would be. It lies in the run
            folder, and is not written again where it is there.
    """

    train: RetrainConfig
    data: DataConfig
    teacher: str | None = None
    teacher_dtype: str = "float32"
    teacher_cache: str | None = None
    teacher_k: int = 64
    sample: SampleConfig | None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        """What is read besides the program."""
        data = self.data
        return inputs_of(data.source, data.beside, data.validation, self.teacher, self.teacher_cache)


@dataclass(frozen=True, kw_only=True)
class ExportSection:
    """What `sparsepass export` does; several, as a list, write several targets.

    In a recipe ``target`` is a target as text, and its options may stand beside it: ``{target: onnx, opset: 18}``. Those of
    engines may stand together below ``engine``, those of the target torch below ``semi_structured``.

    Attributes:
        target: What to write.
        verify: Whether what was written is opened and compared.
    """

    target: Target
    verify: bool = True

    @property
    def settings(self) -> dict[str, Any]:
        """The section as ``stages.json`` holds it, in the form that earlier versions wrote."""
        own = dataclasses.asdict(self.target)
        plain = {name: own.pop(name, None) for name in ("dtype", "opset", "task")}
        group = next((group for group, name in OLD_GROUPS.items() if name == self.target.name), "options")
        changed = any(own[each.name] != each.default for each in dataclasses.fields(self.target) if each.name in own)
        groups = dict.fromkeys(OLD_GROUPS) | ({group: own} if changed else {})
        return {"target": self.target.name, **plain, **groups, "verify": self.verify}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole recipe, checked.

    Attributes:
        model: The model.
        out: Folder below which each stage writes its own.
        prune: None if the model is a saved program.
        retrain: None for no training.
        eval: None for no perplexity.
        export: One for each target.
        measure: None if what was exported is not measured.
    """

    model: ModelSource
    out: Path
    prune: PruneSection | None = None
    retrain: RetrainSection | None = None
    eval: Evaluation | None = None
    export: tuple[ExportSection, ...] = ()
    measure: MeasureSection | None = None

    @property
    def dtype(self) -> str | None:
        """Type in which the model is loaded: what is retrained is float32, unless the recipe says otherwise."""
        return self.model.dtype or ("float32" if self.retrain else None)


def read_recipe(
    name: str | Path, assignments: Sequence[str] = (), *, model: str | None = None, out: str | Path | None = None
) -> Recipe:
    """Read a recipe file, or one that comes with the package, and check all of it.

    Args:
        name: Path of the file, or name of a recipe.
        assignments: Single values set on the command line: ``retrain.train.lr=1e-4``.
        model: Instead of the recipe's model.
        out: Instead of its ``out``.

    Raises:
        SparsepassError: If something is unknown (the nearest name is said), of a wrong type, out of range, missing, or cannot
            follow what stands before it.

    Example:
        >>> recipe = read_recipe("smollm2-cpu", ["retrain.train.lr=1e-4"], out="here")
        >>> recipe.retrain.train.lr, recipe.out.name
        (0.0001, 'here')
    """
    settings = override(parse_settings(read_recipe_text(name), str(name)), assignments)
    if model is not None:
        known = settings.get("model")
        settings["model"] = {**known, "source": model} if isinstance(known, dict) else model
    if out is not None:
        settings["out"] = str(out)
    return recipe_of(settings, str(name))


def recipe_of(settings: Mapping[str, Any], where: str) -> Recipe:
    """Make a recipe of plain values; see `read_recipe`."""
    refuse_unknown(settings, ORDER, where)
    if missing := [name for name in ("model", "out") if settings.get(name) in (None, "")]:
        raise SparsepassError(f"{where}: {missing[0]} is missing; it names {_MISSING[missing[0]]}")
    model = settings["model"]
    exports = settings.get("export") or []
    recipe = Recipe(
        model=_model({"source": model} if isinstance(model, str) else model, f"{where}: model"),
        out=Path(str(settings["out"])).expanduser(),
        prune=_prune_section(settings["prune"] or {}, f"{where}: prune") if "prune" in settings else None,
        retrain=retrain_section(settings["retrain"], f"{where}: retrain") if settings.get("retrain") is not None else None,
        eval=_optional(Evaluation, settings, "eval", where),
        export=tuple(_export_section(one, f"{where}: export") for one in (exports if isinstance(exports, list) else [exports])),
        measure=_measure_section(settings["measure"], f"{where}: measure") if settings.get("measure") is not None else None,
    )
    _check(recipe, where)
    return recipe


def retrain_section(settings: Any, where: str) -> RetrainSection:
    """Make the section ``retrain`` of plain values.

    Raises:
        SparsepassError: If something in it does not fit.
    """
    _mapping(settings, where)
    refuse_unknown(settings, _names(RetrainSection), where)
    inner = {
        "train": RetrainConfig.from_mapping(_mapping(settings.get("train") or {}, f"{where}.train"), where=f"{where}.train"),
        "data": read_settings(DataConfig, _mapping(settings.get("data") or {}, f"{where}.data"), where=f"{where}.data"),
        "sample": _optional(SampleConfig, settings, "sample", where),
    }
    return read_settings(RetrainSection, {**settings, **inner}, where=where)


def read_retrain_section(
    config: str | None, assignments: Sequence[str], given: Mapping[str, Any], *, source: str | Sequence[str] | None = None
) -> RetrainSection:
    """Read the settings of a training run: a file with ``train`` and ``data``, or a recipe's section ``retrain``.

    Args:
        config: Path of the file, or name of a recipe that comes along; None for the defaults.
        assignments: Single values: ``train.lr=1e-4``.
        given: Other values of the section, such as the teacher.
        source: Instead of the training data's source.

    Raises:
        SparsepassError: If something in it is unknown, missing, or does not fit.

    Example:
        >>> read_retrain_section("smollm2-cpu", ["train.lr=1e-3"], {}, source="python-docs").train.lr
        0.001
    """
    where = "the training settings" if config is None else str(config)
    settings = {} if config is None else parse_settings(read_recipe_text(config), where)
    if set(settings) & set(ORDER):
        refuse_unknown(settings, ORDER, where)
        settings, where = dict(_mapping(settings.get("retrain") or {}, where)), f"{where}: retrain"
    settings = {**override(settings, assignments), **given}
    if source is not None:
        settings["data"] = {**_mapping(settings.get("data") or {}, f"{where}: data"), "source": source}
    section = retrain_section(settings, where)
    check_retrain(section, where)
    return section


def _model(settings: Any, where: str) -> ModelSource:
    """The model of a recipe. Whether its own code may run is for the command line alone to say."""
    refuse_unknown(_mapping(settings, where), [name for name in _names(ModelSource) if name != "trust_remote_code"], where)
    return read_settings(ModelSource, settings, where=where)


def _prune_section(settings: Any, where: str) -> PruneSection:
    known = PruneSection().settings
    refuse_unknown(_mapping(settings, where), known, where)
    own = {name: value for name, value in settings.items() if name in ("passes", "validate")}
    calibration = {"data" if name == "calibration" else name: settings[name] for name in settings if name not in own}
    if isinstance(calibration.get("data"), list):
        calibration["data"] = calibration["data"][0] if len(calibration["data"]) == 1 else tuple(map(str, calibration["data"]))
    return read_settings(
        PruneSection, {**own, "calibration": read_settings(Calibration, calibration, where=where)}, where=where
    )


def _names(kind: Any) -> list[str]:
    return [each.name for each in dataclasses.fields(kind)]


def _export_section(settings: Any, where: str) -> ExportSection:
    given = dict(_mapping(settings, where))
    named, verify = str(given.pop("target", "")), given.pop("verify", True)
    table = targets_table()
    refuse_unknown([named.partition("{")[0].strip()], table, f"{where}.target")
    try:
        base = parse_target(named)
        refuse_unknown(given, {name for kind in table.values() for name in kind.options()} | {*OLD_GROUPS, "verify"}, where)
        options = {each.name: value for each in dataclasses.fields(base) if (value := getattr(base, each.name)) != each.default}
        for name, value in given.items():
            if OLD_GROUPS.get(name) == base.name and value is not None:
                refuse_unknown(_mapping(value, f"{where}.{name}"), base.options(), f"{where}.{name}")
                options |= value
            elif value is not None:
                refuse_option(base, name)
                options[name] = value
    except SparsepassError as error:
        raise error if str(error).startswith(where) else SparsepassError(f"{where}: {error}") from error
    target = read_settings(type(base), options, where=where)
    return _section(ExportSection, {"target": target, "verify": verify}, where)


def _measure_section(settings: Any, where: str) -> MeasureSection:
    given = dict(_mapping(settings, where))
    if "bench" in given:
        given["bench"] = _optional(BenchSettings, given, "bench", where)
    return read_settings(MeasureSection, given, where=where)


def _check(recipe: Recipe, where: str) -> None:
    """What the fields cannot tell one by one."""
    is_program = (Path(recipe.model.source).expanduser() / PROGRAM_FILE).is_file()
    if recipe.prune is None and not is_program:
        raise SparsepassError(
            f"{where}: there is no section prune, and the model {recipe.model.source} is no saved program, so there is nothing "
            "sparse to go on with; add prune, or name a folder that `sparsepass prune` wrote"
        )
    quantizes = False
    pipeline: tuple[Pass, ...] = ()
    if recipe.prune is not None:
        try:
            pipeline = parse_pipeline(recipe.prune.passes)
            resolved(pipeline, has_calibration=recipe.prune.calibration.data is not None)
            quantizes = any(Condition.QUANTIZED in item.provides for item in pipeline)
            if recipe.retrain is not None and not is_program:  # what a saved one holds is looked at when it is read
                check_quantize(quantizes, recipe.retrain.train.quantize)
        except SparsepassError as error:
            raise SparsepassError(f"{where}: prune.passes: {error}") from error
        recipe.prune.calibration.check(f"{where}: prune.calibration")
    if recipe.retrain is not None:
        check_retrain(recipe.retrain, f"{where}: retrain")
    if recipe.eval is not None:
        recipe.eval.check()
    if recipe.model.dtype is not None:
        parse_dtype(recipe.model.dtype)
    _check_exports(recipe, pipeline, where)
    if recipe.measure is not None:
        targets = [section.target for section in recipe.export]
        recipe.measure.check(targets, f"{where}: measure", recipe.model, is_program=is_program, is_quantized=quantizes)


def check_retrain(section: RetrainSection, where: str) -> None:
    """Make sure that what a training reads is there, before anything runs.

    Args:
        section: The section.
        where: Its place, for messages.

    Raises:
        SparsepassError: If a source is missing, or settings contradict each other.
    """
    if section.data.source is None:
        raise SparsepassError(f"{where}.data: there is no source; name {_TEXT_FORMS}")
    parse_dtype(section.teacher_dtype)
    if section.sample is not None and section.data.beside is not None:
        raise SparsepassError(
            f"{where}: what the teacher writes (sample) is mixed in, and so is data.beside ({section.data.beside}); leave one "
            "out"
        )
    named_sources = (("source", section.data.source), ("beside", section.data.beside), ("validation", section.data.validation))
    for what, named in named_sources:
        for one in named if isinstance(named, tuple) else (named,):
            if isinstance(one, str) and one != PYTHON_DOCS:
                locate(one, what=f"{where}.data.{what}", forms=_TEXT_FORMS)


def check_named(section: RetrainSection, trust_remote_code: bool, from_checkpoint: str | Path | None = None) -> None:
    """Make sure that what a training names is there, or can be written, before anything is loaded.

    Raises:
        SparsepassError: If the teacher or checkpoint is missing, or the folder for the teacher's logits cannot be written.
    """
    if section.teacher is not None and not is_cached(section):
        ModelSource(source=section.teacher, trust_remote_code=trust_remote_code).check()
    if section.teacher_cache is not None:
        check_writable(section.teacher_cache)
    if from_checkpoint is not None and not Path(from_checkpoint).is_dir():
        raise SparsepassError(
            f"checkpoint {from_checkpoint} does not exist; name a run folder (OUT.run), or a folder step-... in it"
        )


def is_cached(section: RetrainSection) -> bool:
    """Whether logits of the teacher were written before, so that it may be gone."""
    return section.teacher_cache is not None and Path(section.teacher_cache).is_dir()


def _check_exports(recipe: Recipe, passes: Iterable[Pass], where: str) -> None:
    names = [one.target.name for one in recipe.export]
    for name in names:
        if names.count(name) > 1:
            raise SparsepassError(f"{where}: export: the target {name} is there twice; each has one folder")
    for one in recipe.export:
        try:
            one.target.check_passes(passes)
        except SparsepassError as error:
            raise SparsepassError(f"{where}: export: {error}") from error


def _optional(kind: type[Kind], settings: Mapping[str, Any], name: str, where: str) -> Kind | None:
    found = settings.get(name)
    return None if found is None else _section(kind, found, f"{where}: {name}")


def _section(kind: type[Kind], settings: Any, where: str) -> Kind:
    return read_settings(kind, _mapping(settings, where), where=where)


def _mapping(settings: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(settings, Mapping):
        raise SparsepassError(f"{where} has to be settings of the form `name: value`, got {settings!r}")
    return settings


_MISSING: Final = {
    "model": "a folder, a hub id, a .gguf file or a saved program",
    "out": "the folder below which each stage writes its own",
}
