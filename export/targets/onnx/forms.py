"""How weights that are quantized stand in an ONNX file. Imports neither torch nor onnx: the options are read from here."""

from typing import Final, Literal, get_args

from sparsepass.export.targets.contract import option_error

Form = Literal["qdq", "matmulnbits", "dense"]
FORMS: Final[tuple[str, ...]] = get_args(Form)


def check_form(form: str, fold_slorb: bool, known: tuple[str, ...] = FORMS, target: str = "onnx") -> None:
    """Refuse a form that there is not.

    Args:
        form: As asked for.
        fold_slorb: Whether SLoRB branches are to go into zero points.
        known: The forms of a target.
        target: Its name.

    Raises:
        SparsepassError: If there is no such form, or a branch cannot be folded into it.
    """
    if form not in known:
        raise option_error(f"form={form} is not known to the target {target}; expected {' or '.join(known)}")
    if fold_slorb and form != "matmulnbits":
        raise option_error(
            "fold_slorb puts SLoRB branches into zero points that are no integers, which MatMulNBits alone takes; give "
            f"form=matmulnbits, not {form}"
        )
