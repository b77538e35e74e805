"""The report of an artifact: its document, its pages, its pictures."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparsepass.export.report.blocks import Block as Block, Sentence as Sentence, Table as Table
    from sparsepass.export.report.charts import Line as Line, Picture as Picture, line_chart as line_chart
    from sparsepass.export.report.document import (
        HTML_FILE as HTML_FILE,
        OF_FILES as OF_FILES,
        PAGES as PAGES,
        add_to_report as add_to_report,
        changed_report as changed_report,
        find_report as find_report,
        measurement as measurement,
        new_report as new_report,
        plain_json as plain_json,
        read_report as read_report,
        run_record as run_record,
        write_pages as write_pages,
        write_report as write_report,
    )
    from sparsepass.export.report.layers import layer_sparsity as layer_sparsity
    from sparsepass.export.report.pages import markdown_table as markdown_table
    from sparsepass.export.report.schema import ReportDocument as ReportDocument, json_schema as json_schema
    from sparsepass.export.report.sections import (
        AccuracySection as AccuracySection,
        ArtifactSection as ArtifactSection,
        CheckEntry as CheckEntry,
        MeasurementEntry as MeasurementEntry,
        PassEntry as PassEntry,
        PassesSection as PassesSection,
        SamplesSection as SamplesSection,
        TensorEntry as TensorEntry,
        TrainingEntry as TrainingEntry,
        VerificationSection as VerificationSection,
    )
    from sparsepass.export.report.sizes import (
        FileSizeEntry as FileSizeEntry,
        FormEntry as FormEntry,
        SizeSection as SizeSection,
    )
    from sparsepass.export.report.speed import (
        RateEntry as RateEntry,
        SideEntry as SideEntry,
        SpeedPointEntry as SpeedPointEntry,
        SpeedSection as SpeedSection,
    )
    from sparsepass.export.report.training import retraining_run as retraining_run, training_pictures as training_pictures
    from sparsepass.export.report.view import section_view as section_view, summary as summary
    from sparsepass.export.report.words import size as size
else:
    from sparsepass._lazy import face

    __getattr__, __dir__, __all__ = face(__name__, __file__)
