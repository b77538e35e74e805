"""The report as one HTML file."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparsepass.export.report.html.page import render_html as render_html
else:
    from sparsepass._lazy import face

    __getattr__, __dir__, __all__ = face(__name__, __file__)
