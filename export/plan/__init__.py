"""What 2:4 would gain on a device, layer by layer, from a configuration alone."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparsepass.export.plan.choice import ignore_patterns as ignore_patterns, pipeline_text as pipeline_text
    from sparsepass.export.plan.devices import find_device as find_device, find_runtime as find_runtime
    from sparsepass.export.plan.forecast import plan as plan
    from sparsepass.export.plan.forms import sizes as sizes
    from sparsepass.export.plan.model import load_for_plan as load_for_plan
    from sparsepass.export.plan.pages import page as page
    from sparsepass.export.plan.roofline import (
        Matmul as Matmul,
        dense_time as dense_time,
        sparse_time as sparse_time,
        weight_bits as weight_bits,
    )
else:
    from sparsepass._lazy import face

    __getattr__, __dir__, __all__ = face(__name__, __file__)
