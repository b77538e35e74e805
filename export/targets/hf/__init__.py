"""The target `hf`: a folder that plain transformers loads."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparsepass.export.targets.hf.adapter import (
        ADAPTER_FOLDER as ADAPTER_FOLDER,
        adapter_names as adapter_names,
        read_adapter as read_adapter,
        write_branches as write_branches,
    )
    from sparsepass.export.targets.hf.card import front_matter as front_matter
    from sparsepass.export.targets.hf.lower import (
        PEFT_TASKS as PEFT_TASKS,
        HfArtifact as HfArtifact,
        auto_class as auto_class,
        lower_hf as lower_hf,
        save_model as save_model,
        settle_config as settle_config,
    )
    from sparsepass.export.targets.hf.target import HuggingFace as HuggingFace
    from sparsepass.export.targets.hf.verify import (
        check_outputs as check_outputs,
        load_plain as load_plain,
        verify_hf as verify_hf,
    )
else:
    from sparsepass._lazy import face

    __getattr__, __dir__, __all__ = face(__name__, __file__)
