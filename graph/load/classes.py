"""The class that a checkpoint is loaded as."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sparsepass.graph.support import SparsepassError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Task -> the tables of transformers that name a model class for it, and the Auto class for models with code of their
# own.
TASKS: dict[str, tuple[tuple[str, str], ...]] = {
    "text-generation": (("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "AutoModelForCausalLM"),),
    "feature-extraction": (("MODEL_MAPPING_NAMES", "AutoModel"),),
    "fill-mask": (("MODEL_FOR_MASKED_LM_MAPPING_NAMES", "AutoModelForMaskedLM"),),
    "text-classification": (("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES", "AutoModelForSequenceClassification"),),
    "token-classification": (("MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES", "AutoModelForTokenClassification"),),
    "question-answering": (("MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES", "AutoModelForQuestionAnswering"),),
    "text2text-generation": (("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "AutoModelForSeq2SeqLM"),),
    "image-classification": (("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES", "AutoModelForImageClassification"),),
    "image-text-to-text": (("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "AutoModelForImageTextToText"),),
    "zero-shot-image-classification": (
        ("MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES", "AutoModelForZeroShotImageClassification"),
    ),
    "audio-classification": (("MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES", "AutoModelForAudioClassification"),),
    "automatic-speech-recognition": (
        ("MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES", "AutoModelForSpeechSeq2Seq"),
        ("MODEL_FOR_CTC_MAPPING_NAMES", "AutoModelForCTC"),
    ),
}


def model_class_of(config: "PretrainedConfig", task: str | None, name: str, *, trust_remote_code: bool) -> Any:
    """The class for the task, or the one that config.json names.

    Raises:
        SparsepassError: If there is none.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    own_code: Mapping[str, str] = getattr(config, "auto_map", None) or {}
    if task is not None:
        for table, auto_class in TASKS[task]:
            if trust_remote_code and auto_class in own_code:
                return getattr(transformers, auto_class)
            found = getattr(modeling_auto, table).get(config.model_type)
            if found is not None:
                return getattr(transformers, found if isinstance(found, str) else found[0])
        raise SparsepassError(
            f"model {name} is a {config.model_type} model, and transformers {transformers.__version__} has no class "
            f"for the task {task} of such a model; leave the task out to load the class that config.json names"
        )
    architectures = config.architectures or []
    for architecture in architectures:
        model_class = getattr(transformers, architecture, None)
        if model_class is not None:
            return model_class
    if trust_remote_code:
        for reference in own_code:
            if reference.startswith("AutoModel"):
                return getattr(transformers, reference)
    if architectures:
        raise SparsepassError(
            f"model {name} is of the class {', '.join(architectures)}, which transformers {transformers.__version__} "
            "does not have; upgrade transformers, or pass trust_remote_code if the checkpoint brings its own code and "
            "you trust it"
        )
    raise SparsepassError(
        f"config.json of model {name} does not name the model's class (architectures); say which with task, for "
        "example text-generation"
    )
