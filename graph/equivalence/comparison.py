"""Whether two artifacts compute the same function: models, programs and ONNX files.

It compares what two artifacts return on given inputs, and if they differ, names the first layer at which they part.
That is evidence on these inputs, not a proof for all inputs: see docs/equivalence.md.
"""

import io
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from sparsepass._terminal import Terminal
from sparsepass.graph.equivalence.artifact import Artifact, CallNumbers, Inputs, coarsest
from sparsepass.graph.equivalence.differences import Difference, TensorDifference, difference, figures, tensor_difference
from sparsepass.graph.equivalence.running import open_artifact, outputs_of, run
from sparsepass.graph.support import EquivalenceError

DEFAULT_RTOL: Mapping[torch.dtype, float] = {
    torch.float64: 1e-9,
    torch.float32: 1e-5,
    torch.float16: 5e-3,
    torch.bfloat16: 3e-2,
}
"""Relative error allowed by default, by the coarsest dtype involved: room for another order of summation, no more."""

# Outputs that one side may lack: caches and intermediate results, which exporters leave out or name differently.
_AUXILIARY = re.compile(
    r"past_key_values|present|cache_params|hidden_states|attentions|router_logits|"
    r"(encoder|decoder|cross)_(last_hidden_state|hidden_states|attentions)|loss$"
)
_WIDTH, _NAME_WIDTH = 80, 32
_ROWS_SHOWN = 12


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How far a candidate is from a reference on given inputs. `str()` is a table, `to_dict()` is for machines.

    Attributes:
        reference: What was taken as the reference.
        candidate: What was compared with it.
        outputs: The difference of the outputs.
        layers: The difference of each layer that both have, in the reference's order; empty unless asked for.
        not_compared: Output or layer -> why it was not compared.
        dtype: The coarsest floating dtype of both sides, which decides the default tolerance.
        tolerance: Relative error beyond which a layer counts as parted.
    """

    reference: str
    candidate: str
    outputs: Difference
    layers: tuple[TensorDifference, ...] = ()
    not_compared: Mapping[str, str] = field(default_factory=dict)
    dtype: torch.dtype
    tolerance: float

    @property
    def max_error(self) -> float:
        """Largest absolute difference in any output."""
        return self.outputs.max_error

    @property
    def relative_error(self) -> float:
        """Norm of the difference of all outputs over the norm of the reference."""
        return self.outputs.relative_error

    @property
    def kl(self) -> float | None:
        """Mean over tokens of KL(reference || candidate) in nats; None without logits."""
        return self.outputs.kl

    @property
    def first_divergence(self) -> str | None:
        """Module path of the first layer, as the reference runs them, beyond the tolerance; None if none is."""
        return next((found.name for found in self.layers if found.relative_error > self.tolerance), None)

    def failures(
        self, *, atol: float | None = None, rtol: float | None = None, max_kl: float | None = None, exact: bool = False
    ) -> tuple[str, ...]:
        """Say which bounds the outputs break; empty if they are equivalent.

        Args:
            atol: Bound of the largest absolute difference; None for no such bound.
            rtol: Bound of the relative error of each output; None for the default of the dtype, or for no such bound if another
                one is given.
            max_kl: Bound of the divergence of logits; None for no such bound.
            exact: Whether equal numbers are demanded; the other bounds do not matter then.

        Raises:
            EquivalenceError: If a bound is negative or NaN, or max_kl is given and there are no logits.
        """
        for name, given in {"atol": atol, "rtol": rtol, "max_kl": max_kl}.items():
            if given is not None and not given >= 0:
                raise EquivalenceError(f"{name} must be a number that is not negative, got {given}")
        failed = []
        if self.outputs.unknown:
            failed.append(self.outputs.unknown)
        if exact:
            if self.max_error > 0:
                failed.append(f"outputs are not equal: the largest difference is {self.max_error:.3g}")
            return tuple(failed)
        default = default_rtol(self.dtype) if atol is None and max_kl is None else math.inf
        bound = default if rtol is None else rtol
        source = f" (the default for {_short(self.dtype)})" if rtol is None else ""
        for name, found in self.outputs.outputs.items():
            if found.relative_error > bound:
                failed.append(f"{name}: relative error {found.relative_error:.3g} exceeds rtol {bound:g}{source}")
        if atol is not None and self.max_error > atol:
            failed.append(f"largest difference {self.max_error:.3g} exceeds atol {atol:g}")
        if max_kl is not None:
            if self.kl is None:
                raise EquivalenceError(
                    f"max_kl was given, but no output is named logits (there are {list(self.outputs.outputs)}); leave "
                    "max_kl out"
                )
            if self.kl > max_kl:
                failed.append(f"divergence of the logits {self.kl:.3g} exceeds max_kl {max_kl:g}")
        return tuple(failed)

    def to_dict(self) -> dict[str, Any]:
        """The whole comparison as JSON."""
        return {
            "reference": self.reference,
            "candidate": self.candidate,
            "dtype": _short(self.dtype),
            "tolerance": self.tolerance,
            "first_divergence": self.first_divergence,
            **self.outputs.to_dict(),
            "layers": {found.name: found.to_dict() for found in self.layers},
            "not_compared": dict(self.not_compared),
        }

    def __str__(self) -> str:
        title = Text(f"{self.candidate} against {self.reference}")  # as Text: names may hold what rich takes for markup
        table = Table(title=title, title_justify="left", show_edge=False)
        table.add_column("", overflow="fold", min_width=_NAME_WIDTH)
        for column in ("max error", "mean error", "relative error", "KL"):
            table.add_column(column, justify="right")
        for found in self.outputs.outputs.values():
            table.add_row(*_row(found))
        shown = self._shown_layers()
        if shown:
            table.add_section()
        for found in shown:
            table.add_row(*_row(found), style="bold" if found.name == self.first_divergence else None)
        buffer = io.StringIO()
        Terminal(file=buffer, width=_WIDTH, no_color=True).print(table)
        return buffer.getvalue() + "\n".join(self._summary(len(shown)))

    def _shown_layers(self) -> list[TensorDifference]:
        """Around the first divergence, or the worst ones in their order."""
        if len(self.layers) <= _ROWS_SHOWN:
            return list(self.layers)
        index = next((i for i, found in enumerate(self.layers) if found.name == self.first_divergence), None)
        if index is not None:
            start = max(index - 2, 0)
            return list(self.layers[start : start + _ROWS_SHOWN])
        worst = sorted(range(len(self.layers)), key=lambda i: -self.layers[i].relative_error)[:_ROWS_SHOWN]
        return [self.layers[i] for i in sorted(worst)]

    def _summary(self, num_shown: int) -> list[str]:
        lines = []
        if self.layers:
            lines.append(f"{len(self.layers)} layers compared, {num_shown} shown; tolerance {self.tolerance:g}")
            lines.append(f"first layer at which they part: {self.first_divergence or 'none'}")
        lines += [f"not compared: {name}: {reason}" for name, reason in list(self.not_compared.items())[:_ROWS_SHOWN]]
        if (left := len(self.not_compared) - _ROWS_SHOWN) > 0:
            lines.append(f"not compared: {left} more, see to_dict()")
        return lines


def compare(a: Any, b: Any, inputs: Inputs, *, layers: bool = True, tolerance: float | None = None) -> Comparison:
    """Compare what two artifacts return on the same inputs, layer by layer.

    Outputs are matched by name. Caches and intermediate states are compared where both return them; any other output
    must be on both sides. Two artifacts with no name in common but as many outputs are matched by position.

    Layers are matched by module path. Where one side has other axes in front (GPT-2's matmuls are 2-D in a graph), they
    are compared entry by entry.

    Args:
        a: The reference; see `run` for what it may be.
        b: The candidate.
        inputs: Inputs of both.
        layers: Whether layers are compared too, to find where they part. Needs memory for the results of all layers.
        tolerance: Relative error beyond which a layer counts as parted; by default `default_rtol` of the coarser dtype.

    Returns:
        The figures. It does not judge: see `Comparison.failures` and `assert_equivalent`.

    Raises:
        EquivalenceError: If either cannot be run, or their outputs cannot be matched.

    Example:
        >>> layer = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> compare(layer, layer, torch.ones(2, 8)).max_error
        0.0
    """
    first, second = open_artifact(a), open_artifact(b)
    dtype = coarsest([first.dtype, second.dtype])
    reference = run(first, inputs, layers=layers)
    found: dict[str, TensorDifference] = {}
    not_compared: dict[str, str] = {}
    numbers = CallNumbers()

    def measure(path: str, value: Tensor) -> None:
        name = numbers.name(path)
        expected = reference.layers.get(name)
        if expected is None:
            not_compared[name] = f"{first.description} has no such layer"
        elif expected.numel() != value.numel():
            not_compared[name] = f"shapes {list(expected.shape)} and {list(value.shape)}"
        else:
            found[name] = tensor_difference(name, expected, value.reshape(expected.shape))

    candidate = outputs_of(second, inputs, measure if layers else None)
    _drop_unequal_calls(found, reference.layers, not_compared)
    for name in reference.layers:
        if name not in found:
            not_compared.setdefault(name, f"{second.description} has no such layer")
    outputs, unmatched = _matched(reference, candidate, first.description, second.description)
    dtype = coarsest([dtype, *(t.dtype for pair in outputs.values() for t in pair)])
    return Comparison(
        reference=first.description,
        candidate=second.description,
        outputs=difference(*({name: pair[side] for name, pair in outputs.items()} for side in (0, 1))),
        layers=tuple(found[name] for name in reference.layers if name in found),
        not_compared=unmatched | not_compared,
        dtype=dtype,
        tolerance=default_rtol(dtype) if tolerance is None else tolerance,
    )


def assert_equivalent(
    a: Any,
    b: Any,
    inputs: Inputs,
    *,
    atol: float | None = None,
    rtol: float | None = None,
    max_kl: float | None = None,
    exact: bool = False,
) -> Comparison:
    """Raise unless two artifacts return the same on given inputs.

    If no bound is given, the relative error of each output (norm of the difference over norm of the reference) must stay within
    `DEFAULT_RTOL` for the coarsest dtype involved: 1e-9 for float64, 1e-5 for float32, 5e-3 for float16, 3e-2 for
    bfloat16.

    Args:
        a: The reference: an nn.Module, a Program, a Hierarchy, or a path (see `run`).
        b: The candidate.
        inputs: Inputs of both.
        atol: Bound of the largest absolute difference; no such bound by default.
        rtol: Bound of the relative error of each output; by default that of the dtype, if no other bound is given.
        max_kl: Bound of the mean KL divergence of logits, in nats; no such bound by default.
        exact: Whether equal numbers are demanded.

    Returns:
        The comparison of the outputs, if they hold.

    Raises:
        EquivalenceError: If they do not hold, with the figures, the first layer at which the two part, and what to look
            at next; or if they cannot be compared.

    Example:
        >>> layer = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> assert_equivalent(layer, layer, torch.ones(2, 8), exact=True).max_error
        0.0
    """
    first, second = open_artifact(a), open_artifact(b)
    comparison = compare(first, second, inputs, layers=False)
    failed = comparison.failures(atol=atol, rtol=rtol, max_kl=max_kl, exact=exact)
    if failed:
        located = compare(first, second, inputs, tolerance=0.0 if exact else rtol)
        raise _failure(failed, located, first, second)
    return comparison


def default_rtol(dtype: torch.dtype) -> float:
    """The relative error allowed by default where `dtype` is the coarsest involved; see `DEFAULT_RTOL`.

    >>> default_rtol(torch.float32)
    1e-05
    """
    return DEFAULT_RTOL.get(dtype, DEFAULT_RTOL[torch.bfloat16])


def _matched(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], name_a: str, name_b: str
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, str]]:
    """Pair the outputs of both sides, and tell what has no partner."""
    main_a, main_b = ([name for name in side if not _AUXILIARY.match(name)] for side in (a, b))
    pairs = {name: (a[name], b[name]) for name in a if name in b}
    if not set(main_a) & set(main_b) and main_a and len(main_a) == len(main_b):
        pairs |= {name: (a[name], b[other]) for name, other in zip(main_a, main_b, strict=True)}
        main_b = main_a
    for has, lacks, who in ((main_a, main_b, name_b), (main_b, main_a, name_a)):
        if missing := [name for name in has if name not in lacks]:
            raise EquivalenceError(
                f"{who} does not return {missing}: {name_a} returns {main_a}, {name_b} returns {main_b}; let both "
                "return the same, or compare chosen outputs with difference(run(a, inputs), ...)"
            )
    if not pairs:
        raise EquivalenceError(f"{name_a} and {name_b} have no output in common: {list(a)} and {list(b)}")
    alone = {name: f"only {name_a} returns it" for name in a if name not in pairs}
    alone |= {name: f"only {name_b} returns it" for name in b if _AUXILIARY.match(name) and name not in pairs}
    return pairs, alone


def _drop_unequal_calls(found: dict[str, TensorDifference], layers: Mapping[str, Tensor], not_compared: dict[str, str]) -> None:
    """Of a module that one side calls more often, no call has a sure partner."""
    calls_a = Counter(name.partition("#")[0] for name in layers)
    calls_b = Counter(name.partition("#")[0] for name in [*found, *not_compared])
    for name in list(found):
        path = name.partition("#")[0]
        if calls_a[path] != calls_b[path]:
            del found[name]
            not_compared[name] = f"called {calls_a[path]} times in one and {calls_b[path]} times in the other"


def _failure(failed: tuple[str, ...], found: Comparison, a: Artifact, b: Artifact) -> EquivalenceError:
    kl = "" if found.kl is None else f", KL {found.kl:.3g}"
    lines = [
        f"{b.description} is not equivalent to {a.description} on these inputs:",
        *(f"  {reason}" for reason in failed),
        f"  figures: max error {found.max_error:.3g}, mean error {found.outputs.mean_error:.3g}, relative error "
        f"{found.relative_error:.3g}{kl}",
    ]
    parted = found.first_divergence
    if parted is not None:
        names = [layer.name for layer in found.layers]
        place = names.index(parted)
        error = found.layers[place].relative_error
        lines.append(
            f"  first layer at which they part: {parted}, {place + 1} of {len(names)} compared (relative error "
            f"{error:.3g}, tolerance {found.tolerance:g}" + (f"; last that agrees: {names[place - 1]})" if place else ")")
        )
        path = parted.partition("#")[0]
        for role, side in (("reference", a), ("candidate", b)):
            if facts := side.facts(path):
                lines.append(f"    {role}: {facts}")
        lines.append(
            "  look next at what that layer adds to its inputs: its weight, the mask and the axis it runs along, the "
            "SLoRB branch, the bias, and the order of its input channels; then at whatever stands between it and the "
            "last layer that agrees"
        )
    elif found.layers:
        lines.append(
            f"  all {len(found.layers)} layers that both have agree within {found.tolerance:g}, so they part after the "
            "last of them, in between, or in small steps: look at the operators without weights (norms, activations, "
            "attention mask, positions), and at print(compare(a, b, inputs))"
        )
    else:
        lines.append(
            "  no layer is known on both sides, so the place cannot be told: export the ONNX file with "
            "torch.onnx.export (dynamo=True), which records module names, and compare artifacts of the same model"
        )
    return EquivalenceError(lines[0], lines=lines[1:])


def _row(found: TensorDifference) -> tuple[str, ...]:
    return found.name, *("" if value is None else f"{value:.3g}" for value in figures(found).values())


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
