"""What a command does: prepare, prune, retrain, export, and runs of several stages from one file."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparsepass.export.stages.benching import bench as bench, measure_speed as measure_speed
    from sparsepass.export.stages.criteria import (
        CRITERIA_TITLE as CRITERIA_TITLE,
        CriteriaSettings as CriteriaSettings,
        Job as Job,
        criteria_page as criteria_page,
        criteria_rows as criteria_rows,
        criteria_table as criteria_table,
        is_criteria_file as is_criteria_file,
        jobs_of as jobs_of,
    )
    from sparsepass.export.stages.exporting import (
        SAMPLES_FILE as SAMPLES_FILE,
        ExportResult as ExportResult,
        export as export,
        read_samples as read_samples,
        refuse_option as refuse_option,
    )
    from sparsepass.export.stages.harness import check_tasks as check_tasks, lm_eval_tasks as lm_eval_tasks
    from sparsepass.export.stages.integrity import (
        Side as Side,
        companion_differences as companion_differences,
        folder_contradictions as folder_contradictions,
    )
    from sparsepass.export.stages.measuring import MeasureSection as MeasureSection
    from sparsepass.export.stages.news import listen as listen
    from sparsepass.export.stages.perplexities import accuracy as accuracy
    from sparsepass.export.stages.preparing import prepare as prepare, stage_name as stage_name, write_program as write_program
    from sparsepass.export.stages.recipe import (
        RetrainSection as RetrainSection,
        read_recipe as read_recipe,
        read_retrain_section as read_retrain_section,
    )
    from sparsepass.export.stages.retraining import (
        default_run_folder as default_run_folder,
        retrain_and_report as retrain_and_report,
        retrain_program as retrain_program,
        write_cache as write_cache,
    )
    from sparsepass.export.stages.run import Outcome as Outcome, planned as planned, run_recipe as run_recipe
    from sparsepass.export.stages.sensitivity import (
        Sensitivity as Sensitivity,
        auto_ignore as auto_ignore,
        sensitivity_pass as sensitivity_pass,
    )
    from sparsepass.export.stages.settings import (
        BenchSettings as BenchSettings,
        Calibration as Calibration,
        Evaluation as Evaluation,
        ModelSource as ModelSource,
        inputs_of as inputs_of,
    )
    from sparsepass.export.stages.yaml_settings import (
        example_text as example_text,
        read_recipe_text as read_recipe_text,
        recipe_names as recipe_names,
    )
else:
    from sparsepass._lazy import face

    __getattr__, __dir__, __all__ = face(__name__, __file__)
