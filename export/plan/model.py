"""What `plan` must know of a model: the layers, the products of attention, and how many rows each sees. No weights are needed.

The program is captured from a configuration alone. Its graph is run twice or more without numbers (fake tensors), with inputs
of different lengths. What grows between the runs tells how many rows a layer sees for each sequence, each source token and
each target token.
"""

import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from sparsepass.graph import Program, Site, SparsepassError
from sparsepass.graph.attention import ATTENTION
from sparsepass.graph.configuration import class_of, configuration_of
from sparsepass.graph.fill import capture_without_weights
from sparsepass.graph.limits import position_limit
from sparsepass.graph.load import check_gguf, split_parts
from sparsepass.graph.records import SparseState
from sparsepass.graph.saved import PROGRAM_FILE
from sparsepass.graph.support import check_inside

Kind = Literal["decoder", "encoder", "encoder-decoder"]
_Shapes: TypeAlias = dict[str, tuple[int, ...]]

_aten = torch.ops.aten
_MATMULS = {_aten.matmul.default, _aten.bmm.default}
_STEP = 4  # tokens by which the second run is longer


@dataclass(frozen=True, kw_only=True)
class Extent:
    """A length as a function of the inputs: ``constant + source * S + target * T`` for each sequence.

    Attributes:
        constant: What does not depend on tokens, such as the patches of an image.
        source: Times the tokens of the prompt, or of an encoder's input.
        target: Times the tokens of a decoder that has an encoder.
    """

    constant: float = 0.0
    source: float = 0.0
    target: float = 0.0

    def at(self, source: float, target: float) -> float:
        """The length for so many tokens.

        >>> Extent(constant=1, source=2).at(10, 0)
        21.0
        """
        return float(self.constant + self.source * source + self.target * target)

    def per_new_token(self, kind: Kind) -> float:
        """How much of it each generated token adds; 0 for an encoder, which generates none."""
        if kind == "encoder":
            return 0.0
        return self.target if kind == "encoder-decoder" else self.source

    @property
    def varies(self) -> bool:
        """Whether it depends on tokens."""
        return bool(self.source or self.target)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A site, with what the roofline needs.

    Attributes:
        site: The site.
        in_features: Length of the sum, kernel positions of a convolution included.
        rows: Rows of its result for each sequence.
        experts: Matrices of which each token takes some; 1 for a plain layer.
        in_decode: Whether it runs again for each new token.
        is_head: Whether it is the output head, of which generation needs one row for each sequence.
        state: What earlier passes did to it.
    """

    site: Site
    in_features: int
    rows: Extent
    experts: int
    in_decode: bool
    is_head: bool
    state: SparseState | None


@dataclass(frozen=True, kw_only=True)
class Product:
    """A product of two activations, ``[m, k] x [k, n]`` for each head: one half of an attention.

    Attributes:
        heads: How many of them there are for each sequence.
        m: Rows of the left one.
        k: Length of the sum.
        n: Columns of the right one, which a decoder keeps in its cache.
        cached_heads: Heads of the right one that are really stored (grouped-query attention stores fewer).
        in_decode: Whether it runs again for each new token.
    """

    heads: float
    m: Extent
    k: Extent
    n: Extent
    cached_heads: float
    in_decode: bool


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A model as `plan` sees it.

    Attributes:
        program: Where it comes from.
        kind: ``decoder`` and ``encoder-decoder`` generate; ``encoder`` is everything else.
        layers: Every site that multiplies, in the graph's order.
        products: Attention.
        window: Tokens that sliding attention looks back; None without it.
        window_share: Share of the attention layers that slide.
        max_tokens: Longest sequence that the configuration allows; None if it says none.
        takes_tokens: Whether the length of the input can vary.
        is_unrolled: Whether the graph was captured for one length only: rows are scaled, and its recurrence is not counted.
        num_parameters: Of the whole model, tied ones once.
    """

    program: Program
    kind: Kind
    layers: tuple[Layer, ...]
    products: tuple[Product, ...]
    window: int | None
    window_share: float
    max_tokens: int | None
    takes_tokens: bool
    is_unrolled: bool
    num_parameters: int


def model_shape(program: Program) -> ModelShape:
    """Read off a program what `plan` needs.

    Args:
        program: With weights or on the meta device, dense or with masks and branches.

    Example:
        >>> from sparsepass import capture
        >>> shape = model_shape(capture(torch.nn.Sequential(torch.nn.Linear(8, 4)), torch.randn(2, 8)))
        >>> shape.kind, shape.layers[0].rows
        ('encoder', Extent(constant=1.0, source=0.0, target=0.0))
    """
    kind, config = _kind(program), _text_config(program)
    sites = program.sites()
    lengths = _lengths(program)
    runs = [_run(program, lengths)]
    for side in ("source", "target"):
        longer = {name: size + _STEP if _side(name) == side else size for name, size in lengths.items()}
        runs.append(_run(program, longer) if longer != lengths else runs[0])
    batch = next(iter(program.example_inputs.values())).shape[0]
    base = {side: next((size for name, size in lengths.items() if _side(name) == side), 0) for side in ("source", "target")}
    heads = {program.aliases.get(name, name) for name in program.origin.output_heads}
    # Tokens of a graph that was captured for one length only, as of unrolled recurrences; 0 for any other.
    ids = program.example_inputs.get("input_ids")
    fixed = int(ids.shape[1]) if kind == "decoder" and not lengths and ids is not None else 0

    def extent(sizes: Iterable[float]) -> Extent:
        first, source, target = sizes
        slope_s, slope_t = (source - first) / _STEP, (target - first) / _STEP
        constant = first - slope_s * base["source"] - slope_t * base["target"]
        if fixed and constant % fixed == 0:
            return Extent(source=constant / fixed)
        return Extent(constant=round(constant, 9), source=slope_s, target=slope_t)

    layers = []
    for site in sites:
        if site.layout in ("embedding", "computed") or not site.nodes:
            continue
        if 0 in site.shape:
            raise SparsepassError(
                f"{site.name} is of shape {'x'.join(map(str, site.shape))}: without inputs or outputs there is nothing to "
                "plan; check the sizes in the model's configuration"
            )
        rows = extent(sum(math.prod(run[node]) for node in site.nodes) / site.out_features / batch for run in runs)
        experts = site.shape[0] if site.layout in ("experts", "experts_transposed") else 1
        layers.append(
            Layer(
                site=site,
                in_features=site.num_weights // site.out_features // experts,
                rows=rows,
                experts=experts,
                in_decode=bool(rows.per_new_token(kind)),
                is_head=site.weight in heads or (site.left_alone or "").startswith("output head"),
                state=program.sparse.get(site.weight),
            )
        )
    ours = {node for site in sites for node in site.nodes}
    others = [] if fixed else [node for node in program.graph_module.graph.nodes if node.name not in ours]
    products = [product for node in others for product in _products(node, runs, extent, batch, kind, config)]
    window, share = _window(config)
    return ModelShape(
        program=program,
        kind=kind,
        layers=tuple(layers),
        products=tuple(products),
        window=window,
        window_share=share,
        max_tokens=position_limit(program.origin.config),
        takes_tokens=bool(fixed) or any(_side(name) == "source" for name in lengths),
        is_unrolled=bool(fixed),
        num_parameters=_num_parameters(program),
    )


def _num_parameters(program: Program) -> int:
    """Of the model itself: no masks, no branches."""
    branches = [state.branch for state in program.sparse.values() if state.branch is not None]
    ours = {name for branch in branches for name in (branch.weight, branch.projection)}
    return sum(weight.numel() for name, weight in program.graph_module.named_parameters() if name not in ours)


def _kind(program: Program) -> Kind:
    if any(_side(name) == "target" for name in program.input_names):
        return "encoder-decoder"
    found = class_of(program.origin)
    return "decoder" if found is not None and found.can_generate() else "encoder"


def _text_config(program: Program) -> Any:
    """The configuration object of the model, of its text part if it has several; None for a plain module."""
    config = configuration_of(program.origin)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _side(name: str) -> Literal["source", "target"]:
    """Whether an input is of the prompt or an encoder, or of a decoder that has an encoder."""
    return "target" if name.startswith("decoder_") else "source"


def _lengths(program: Program) -> dict[str, int]:
    """Input -> tokens of the example, for each input that may be longer or shorter."""
    examples = {name: program.example_inputs[name] for name in program.input_names}
    varying = {name for name, axes in program.dynamic_axes.items() if 1 in axes}
    return {name: example.shape[1] for name, example in examples.items() if example.dim() in (2, 3) and name in varying}


def _run(program: Program, lengths: Mapping[str, int]) -> _Shapes:
    """Shapes of every node's result, for inputs of these lengths."""
    shapes: _Shapes = {}

    class ShapeReader(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if isinstance(result, Tensor):
                shapes[n.name] = tuple(result.shape)
            return result

    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        inputs = []
        for name in program.input_names:
            example, length = program.example_inputs[name], lengths.get(name)
            shape = example.shape if length is None else (example.shape[0], length, *example.shape[2:])
            inputs.append(example.new_empty(shape))
        ShapeReader(program.graph_module).run(*inputs)
    return shapes


def _cached_share(config: Any, shape: Sequence[int]) -> float:
    """Share of the attention's heads that have keys and values of their own, if the graph repeats them before use."""
    heads = _positive(getattr(config, "num_attention_heads", None))
    stored = _positive(getattr(config, "num_key_value_heads", None))
    return stored / heads if heads and stored and len(shape) > 3 and shape[-3] == heads else 1.0


def _products(node: fx.Node, runs: list[_Shapes], extent: Any, batch: int, kind: Kind, config: Any) -> list[Product]:
    """What a node multiplies, if it is an attention or a product of two activations."""
    if node.op != "call_function" or (node.target is not ATTENTION and node.target not in _MATMULS):
        return []
    left, right = node.args[0], node.args[1]
    assert isinstance(left, fx.Node)
    assert isinstance(right, fx.Node)
    shapes = [(run[left.name], run[right.name]) for run in runs]
    if len(shapes[0][0]) < 3 or len(shapes[0][1]) < 3:
        return []
    per_batch = math.prod(shapes[0][0][:-2]) / batch
    cached = math.prod(shapes[0][1][:-2]) / batch * _cached_share(config, shapes[0][1])
    m, k = extent(a[-2] for a, _ in shapes), extent(a[-1] for a, _ in shapes)
    again = bool(m.per_new_token(kind))

    def product(inner: Extent, columns: Extent) -> Product:
        return Product(heads=per_batch, m=m, k=inner, n=columns, cached_heads=cached, in_decode=again)

    if node.target is ATTENTION:
        tokens = extent(b[-2] for _, b in shapes)
        return [product(k, tokens), product(tokens, k)]
    if not k.varies and k.constant == 1:
        return []  # an outer product, as of positions and rotary frequencies
    return [product(k, extent(b[-1] for _, b in shapes))]


def _window(config: Any) -> tuple[int | None, float]:
    """How far sliding attention looks back, and in which share of the layers."""
    window = _positive(getattr(config, "sliding_window", None))
    kinds = [str(kind) for kind in getattr(config, "layer_types", None) or ()]
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return None, 0.0
    attention = [kind for kind in kinds if "attention" in kind and "linear" not in kind]
    return window, sum(kind == "sliding_attention" for kind in attention) / len(attention) if attention else 1.0


def _positive(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def load_for_plan(source: str | Path, *, gguf_file: str | None = None) -> Program:
    """Capture what a user names, on the meta device wherever that is possible.

    Args:
        source: A folder with a config.json (weights may be missing), a .json file that is a configuration, a .gguf file or
            a folder with one, a hub id, or a folder written by ``Program.save``, which comes with its masks and branches.
        gguf_file: Name of the .gguf file, if the folder holds several.

    Raises:
        SparsepassError: If there is no configuration, or the model cannot be captured.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        check_inside(path)
        if (path / PROGRAM_FILE).is_file():
            return Program.load(path)
        if gguf_file is None and (path / "config.json").is_file():
            return capture_without_weights(path)
        return _from_gguf(_gguf(path, gguf_file))
    if path.suffix == ".gguf":
        return _from_gguf(path)
    if path.is_file():
        if path.suffix != ".json":
            raise SparsepassError(f"{path} is a file; expected a folder, a configuration (.json), a .gguf file or a hub id")
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_bytes(path.read_bytes())
            return capture_without_weights(folder)
    if isinstance(source, Path) or len(path.parts) != 2 or path.is_absolute():
        raise SparsepassError(
            f"model {source} does not exist; expected a folder with a config.json, a configuration (.json), a .gguf file, a "
            "saved program, or a hub id such as 'organisation/name'"
        )
    return capture_without_weights(str(source))


def _gguf(folder: Path, name: str | None) -> Path:
    found = sorted(folder.glob(name or "*.gguf"))
    if len(found) == 1:
        return found[0]
    if found and split_parts(path.name for path in found):
        check_gguf(found[0], str(folder))
    if found:
        raise SparsepassError(
            f"{folder} holds several GGUF files ({', '.join(p.name for p in found)}); choose one with gguf_file"
        )
    there = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
    raise SparsepassError(
        f"{folder} has no config.json and no {name or '.gguf file'} (there is {there}); a plan needs the model's configuration"
    )


def _from_gguf(path: Path) -> Program:
    """Read the configuration in a GGUF file's header, and capture the causal language model that it describes."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if not path.is_file():
        raise SparsepassError(f"model {path} does not exist; check the path")
    check_gguf(path, str(path))
    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise SparsepassError(f"{path}: its header cannot be read ({error}); it may be truncated, download it again") from error
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if name is None:
        raise SparsepassError(f"{path} holds a {config.model_type}, of which transformers has no causal language model")
    config.architectures = [name if isinstance(name, str) else name[0]]
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return capture_without_weights(folder)
