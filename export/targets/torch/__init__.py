"""The target `torch`: a Hugging Face folder whose layers torch's semi-structured kernels run."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparsepass.export.targets.torch.choice import MIN_GAIN as MIN_GAIN, Timing as Timing
    from sparsepass.export.targets.torch.kernels import (
        check_device as check_device,
        refusal as refusal,
        semi_structured as semi_structured,
    )
    from sparsepass.export.targets.torch.layer import (
        SemiStructuredLinear as SemiStructuredLinear,
        choose as choose,
        load_dense as load_dense,
    )
    from sparsepass.export.targets.torch.load import load_torch as load_torch, record_of as record_of
    from sparsepass.export.targets.torch.measure import (
        dense_layer as dense_layer,
        measure_layers as measure_layers,
        probe as probe,
        random_two_four as random_two_four,
        time_layers as time_layers,
        time_ms as time_ms,
    )
    from sparsepass.export.targets.torch.record import (
        RECORD_FILE as RECORD_FILE,
        TO_BE_MEASURED as TO_BE_MEASURED,
        LayerRecord as LayerRecord,
        Measured as Measured,
        Record as Record,
        read_record as read_record,
    )
    from sparsepass.export.targets.torch.target import (
        SemiStructured as SemiStructured,
        SemiStructuredOptions as SemiStructuredOptions,
    )
else:
    from sparsepass._lazy import face

    __getattr__, __dir__, __all__ = face(__name__, __file__)
