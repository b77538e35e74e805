"""Mask packs: the N:M masks of a program as a file of their own, apart from the weights.

A group of M entries keeps N of them, in one of C(M, N) ways. A pack stores the number of that way. The numbers are digits, to
the base C(M, N), of 64-bit words. Of 2:4 a word holds 24 groups, which makes 2.67 bits a group and 0.67 bits a weight.

Rules:
1. A pack belongs to the values it was made with: the kept entries of every sparse weight, and every other parameter. Applied to
   a model with the same values it gives the program it came from, bit for bit. Any other model is refused, unless the caller
   asks for the masks alone. The same values in another type are the same: training in float32 widens a bfloat16 model.
2. A pack stands in for a program only if no weight was changed: masks by magnitude or Wanda, or learned ones. What SparseGPT
   compensates or training changes is not in a pack.

Shape suffixes: O rows, I in, G groups, M entries of one group, W words.
"""

import functools
import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, final

import safetensors
import safetensors.torch
import torch
from pydantic import NonNegativeInt, TypeAdapter
from torch import Tensor

from sparsepass.graph import Program, SparsepassError
from sparsepass.graph.fusion import split_siblings
from sparsepass.graph.support import check_as, check_place, counted, open_tensors, parse_json, replaced_file, shown
from sparsepass.passes.maths import NMPattern

FORMAT: Final = "sparsepass-masks"
VERSION: Final = 1
_WORD_BITS: Final = 63  # of a signed 64-bit word
_LARGEST_M: Final = 16
_HEADER: Final = "sparsepass"
_FACTS: Final = ("dense_digest", "recipe", "model_class", "about")
_TYPES: Final = (torch.float32, torch.bfloat16, torch.float16)


def is_mask_pack(path: Path) -> bool:
    """Whether a file is a mask pack, as far as its header tells."""
    try:
        with open_tensors(path) as file:
            header = parse_json((file.metadata() or {}).get(_HEADER, "null"), str(path))
    except SparsepassError:
        return False
    return isinstance(header, Mapping) and header.get("format") == FORMAT


@dataclass(frozen=True, kw_only=True)
class _MaskEntry:
    """What the header says of a mask; see `PackedMask`."""

    pattern: str
    shape: tuple[NonNegativeInt, ...]
    digest: str


@dataclass(frozen=True, kw_only=True)
class _PackHeader:
    """The header of a pack; see `MaskPack`."""

    version: int
    dense_digest: str
    recipe: str
    model_class: str
    about: str
    masks: dict[str, _MaskEntry]


_HEADER_TYPE: Final = TypeAdapter(_PackHeader)


@final
@dataclass(frozen=True, kw_only=True)
class PackedMask:
    """The mask of one weight.

    Attributes:
        pattern: N:M.
        shape: Of the matrix that N:M runs along the last axis of, as `Site.to_matrix` gives it.
        words: Candidate numbers, packed; int64, ``[W]``.
        digest: SHA-256 of the kept entries' bytes, in the matrix's order.
    """

    pattern: str
    shape: tuple[int, ...]
    words: Tensor = field(repr=False)
    digest: str

    def mask(self) -> Tensor:
        """The bool mask, True where a weight is kept.

        Shapes: ``shape``.
        """
        return unpack_mask(self.words, NMPattern.parse(self.pattern), self.shape)


@final
@dataclass(frozen=True, kw_only=True)
class MaskPack:
    """The masks of a program.

    Attributes:
        masks: Weight name -> mask.
        dense_digest: SHA-256 over all parameters that are not sparse, by name; SLoRB branches and logits of masks left out.
        recipe: Passes that made the program.
        model_class: Of the model that was captured.
        about: What the author says, such as the domain.
    """

    masks: Mapping[str, PackedMask] = field(repr=False)
    dense_digest: str
    recipe: str
    model_class: str
    about: str = ""

    @property
    def num_weights(self) -> int:
        """Entries of all masks."""
        return sum(math.prod(known.shape) for known in self.masks.values())

    @property
    def bits_per_weight(self) -> float:
        """Bits of the packed masks for each entry, without the file's header."""
        return sum(64 * known.words.numel() for known in self.masks.values()) / max(1, self.num_weights)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; beside it first, and then moved into place. An earlier pack is replaced.

        Raises:
            SparsepassError: If it cannot be written, or another file stands there.
        """
        header = {
            "format": FORMAT,
            "version": VERSION,
            **{name: getattr(self, name) for name in _FACTS},
            "masks": {
                name: {"pattern": known.pattern, "shape": list(known.shape), "digest": known.digest}
                for name, known in self.masks.items()
            },
        }
        target = Path(path)
        words = {name: known.words.contiguous() for name, known in self.masks.items()}
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            check_place(target, is_ours=is_mask_pack)
            with replaced_file(target) as beside:
                header["sha256"] = _pack_digest(header, words)
                safetensors.torch.save_file(words, beside, {_HEADER: json.dumps(header)})
        except (OSError, safetensors.SafetensorError) as error:
            raise SparsepassError(
                f"the mask pack {target} cannot be written ({error}); what stood there is untouched"
            ) from error

    @staticmethod
    def load(path: str | Path) -> "MaskPack":
        """Read a file that `save` wrote.

        Raises:
            SparsepassError: If it is not there, damaged, no mask pack, or of a newer version.
        """
        place = Path(path)
        if not place.is_file():
            raise SparsepassError(f"there is no mask pack {place}; check the path")
        with open_tensors(place) as file:
            text = (file.metadata() or {}).get(_HEADER)
            words = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        document = None if text is None else parse_json(text, f"the header of {shown(place)}")
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise SparsepassError(f"{shown(place)} is no mask pack; `sparsepass masks PROGRAM -o masks.safetensors` writes one")
        header = check_as(_HEADER_TYPE, document, f"the header of {shown(place)}")
        if header.version > VERSION:
            raise SparsepassError(
                f"{shown(place)} has version {header.version} of the format, and this sparsepass reads up to {VERSION}; "
                "update it"
            )
        masks = {name: _read_mask(name, about, words, place) for name, about in header.masks.items()}
        if document.get("sha256", digest := _pack_digest(document, words)) != digest:  # earlier versions wrote none
            raise SparsepassError(f"{place} is not as it was written (its SHA-256 differs); get it anew, or pack again")
        return MaskPack(masks=masks, **{name: getattr(header, name) for name in _FACTS})

    def check_model(self, program: Program, *, values: bool = True) -> None:
        """Make sure that a program has the weights that the pack has masks for, and the values that it was made with.

        Args:
            program: Its sites, sparse or not, are compared.
            values: Whether values are compared, and not only names and shapes.

        Raises:
            SparsepassError: If something differs.
        """
        sites = {site.weight: site for site in program.sites()}
        if missing := [name for name in self.masks if name not in sites]:
            raise SparsepassError(
                f"the mask pack has masks for {len(missing)} weights that this model does not have, such as {missing[0]}; it "
                f"was made from a {self.model_class}"
            )
        for name, known in self.masks.items():
            shape = tuple(sites[name].to_matrix(program.tensor(name)).shape)
            if shape != known.shape:
                raise SparsepassError(
                    f"the mask of {name} has shape {known.shape}, and the weight {shape}; the pack was made from another "
                    f"{self.model_class}"
                )
        if not values:
            return
        wrong = [
            name
            for name, known in self.masks.items()
            if not _is_digest_of(sites[name].to_matrix(program.tensor(name).detach())[known.mask()], known.digest)
        ]
        if not wrong and any(_dense_digest(program, self.masks, dtype) == self.dense_digest for dtype in (None, *_TYPES)):
            return
        what = f"{len(wrong)} of its {len(self.masks)} weights" if wrong else "parameters beside the masked weights"
        first = f" (the first is {wrong[0]})" if wrong else ""
        raise SparsepassError(
            f"the mask pack was made with other values of {what}{first}: it belongs to another {self.model_class}, to another "
            f"precision, or to weights that its passes ({self.recipe or 'unknown'}) changed, which a pack does not hold. Give "
            "it the model it was made from, or apply the masks alone with any_model=true"
        )


def _read_mask(name: str, about: "_MaskEntry", words: Mapping[str, Tensor], place: Path) -> PackedMask:
    """A mask of a pack, checked: its pattern divides its rows, and each of its words is a number of candidates."""
    damaged = f"{shown(place)} is damaged: the mask of {name!r}"
    try:
        pattern = NMPattern.parse(about.pattern)
        _check_pattern(pattern)
    except SparsepassError as error:
        raise SparsepassError(f"{damaged} has no pattern that is read ({error}); copy it again") from error
    if len(about.shape) < 2 or about.shape[-1] % pattern.m or name not in words:
        raise SparsepassError(f"{damaged} has the shape {list(about.shape)}, and no {pattern} of it is stored; copy it again")
    known = PackedMask(pattern=about.pattern, shape=about.shape, words=words[name], digest=about.digest)
    expected, largest = num_words(known.shape, pattern), math.prod(_digits(pattern)[1:] * _digits(pattern)[0])
    if known.words.shape != (expected,) or known.words.dtype != torch.int64:
        raise SparsepassError(f"{damaged} does not have {expected} words; copy it again")
    if expected and not 0 <= int(known.words.min()) <= int(known.words.max()) < largest:
        raise SparsepassError(f"{damaged} has words that stand for no mask; copy it again")
    return known


def _pack_digest(header: Mapping[str, Any], words: Mapping[str, Tensor]) -> str:
    """SHA-256 of a pack: of what its header says, and of its masks."""
    facts = {name: value for name, value in header.items() if name != "sha256"}
    found = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(words):
        found.update(words[name].contiguous().numpy().tobytes())
    return found.hexdigest()


def pack_program(program: Program, *, about: str = "") -> MaskPack:
    """Make a pack of a program's masks.

    Args:
        program: With masks that are not folded.
        about: Goes into the pack.

    Raises:
        SparsepassError: If it has no masks, or folded ones, or one that is not exactly N of M.

    Example:
        >>> from sparsepass.passes import apply_passes
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU())
        >>> pack = pack_program(apply_passes(model, ["nm_sparsify"], example_inputs=torch.randn(2, 8)))
        >>> list(pack.masks), pack.num_weights
        (['0.weight'], 32)
    """
    if not program.sparse:
        raise SparsepassError("the program has no masks; apply nm_sparsify first")
    program = split_siblings(program)
    by_weight = {site.weight: site for site in program.sites()}
    masks = {}
    for name, state in counted(list(program.sparse.items()), "masks"):
        if state.mask is None:
            raise SparsepassError(f"the mask of {name} is folded into its weight; pack the program before the pass fold")
        site, pattern = by_weight[name], NMPattern.parse(state.pattern)
        mask_OI = site.to_matrix(program.tensor(state.mask))
        try:
            words_W = pack_mask(mask_OI, pattern)
        except SparsepassError as error:
            raise SparsepassError(f"{site.name}: {error}") from error
        digest = kept_digest(site.to_matrix(program.tensor(name).detach()), mask_OI)
        masks[name] = PackedMask(pattern=state.pattern, shape=tuple(mask_OI.shape), words=words_W, digest=digest)
    return MaskPack(
        masks=masks,
        dense_digest=_dense_digest(program, masks) or "",
        recipe=program.recipe,
        model_class=program.origin.model_class or "model",
        about=about,
    )


def pack_mask(mask_OI: Tensor, pattern: NMPattern) -> Tensor:
    """Store a mask as numbers of candidates.

    Shapes: ``[..., I]`` to ``[W]``.

    Args:
        mask_OI: Bool, exactly N of M true along the last axis.
        pattern: N:M.

    Returns:
        int64 words, the first group in the lowest digit.

    Raises:
        SparsepassError: If M is too large, or a group does not have exactly N entries.

    >>> pack_mask(torch.tensor([[True, True, False, False, False, False, True, True]]), NMPattern(2, 4))
    tensor([30])
    """
    _check_pattern(pattern)
    groups_GM = mask_OI.reshape(-1, pattern.m)
    if bool((groups_GM.sum(1) != pattern.n).any()):
        raise SparsepassError(f"a mask pack holds exactly {pattern.n} of {pattern.m}, and a group keeps another number")
    number_of_code, _ = _tables(pattern.n, pattern.m)
    bits_M = 2 ** torch.arange(pattern.m, device=mask_OI.device)
    numbers_G = number_of_code.to(mask_OI.device)[(groups_GM * bits_M).sum(1)]
    per_word, base = _digits(pattern)
    padded = torch.zeros(math.ceil(len(numbers_G) / per_word) * per_word, dtype=torch.int64, device=mask_OI.device)
    padded[: len(numbers_G)] = numbers_G
    weights = torch.tensor([base**digit for digit in range(per_word)], device=mask_OI.device)
    return (padded.view(-1, per_word) * weights).sum(1).cpu()


def unpack_mask(words_W: Tensor, pattern: NMPattern, shape: Iterable[int]) -> Tensor:
    """Undo `pack_mask`.

    Shapes: ``[W]`` to ``shape``.

    >>> unpack_mask(torch.tensor([30]), NMPattern(2, 4), (1, 8)).int()
    tensor([[1, 1, 0, 0, 0, 0, 1, 1]], dtype=torch.int32)
    """
    _check_pattern(pattern)
    shape = tuple(shape)
    _, candidates = _tables(pattern.n, pattern.m)
    per_word, base = _digits(pattern)
    left, digits = words_W.clone(), []
    for _ in range(per_word):
        digits.append(left % base)
        left //= base
    numbers_G = torch.stack(digits, 1).flatten()[: math.prod(shape) // pattern.m]
    return candidates[numbers_G].reshape(shape)


def num_words(shape: Iterable[int], pattern: NMPattern) -> int:
    """Words that a packed mask takes.

    >>> num_words((1, 96), NMPattern(2, 4))
    1
    """
    return math.ceil(math.prod(shape) // pattern.m / _digits(pattern)[0])


def kept_digest(weight_OI: Tensor, mask_OI: Tensor) -> str:
    """SHA-256 of the kept entries' type and bytes."""
    return _digest(weight_OI[mask_OI])


def _is_digest_of(tensor: Tensor, digest: str) -> bool:
    """Whether a digest is that of these values, in their own type or in one that holds the same values."""
    return any(_digest(as_held) == digest for dtype in (tensor.dtype, *_TYPES) if (as_held := _held(tensor, dtype)) is not None)


def _held(tensor: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The same values in another type; None if it does not hold them."""
    converted = tensor.to(dtype)
    return converted if torch.equal(converted.to(tensor.dtype), tensor) else None


def _dense_digest(program: Program, masked: Iterable[str], dtype: torch.dtype | None = None) -> str | None:
    """SHA-256 of the parameters that have no mask, in a type; None for their own. None if the type does not hold them."""
    branches = [state.branch for state in program.sparse.values() if state.branch is not None]
    left_out = {*masked, *(branch.weight for branch in branches), *(branch.projection or "" for branch in branches)}
    left_out |= {state.learned.logits for state in program.sparse.values() if state.learned is not None}
    names = sorted(name for name in dict(program.graph_module.named_parameters()) if name not in left_out)
    digest = hashlib.sha256()
    for name in names:
        values = program.tensor(name).detach()
        if dtype is not None and values.is_floating_point():
            if (held := _held(values, dtype)) is None:
                return None
            values = held
        digest.update(f"{name} {_digest(values)}\n".encode())
    return digest.hexdigest()


def _digest(tensor: Tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
    digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _check_pattern(pattern: NMPattern) -> None:
    if pattern.m > _LARGEST_M:
        raise SparsepassError(f"a mask pack takes patterns of up to {_LARGEST_M} entries a group, not {pattern}")


def _digits(pattern: NMPattern) -> tuple[int, int]:
    """Groups that fit into a word, and the base of their numbers."""
    base = math.comb(pattern.m, pattern.n)
    return int(_WORD_BITS / math.log2(base)), base


@functools.cache
def _tables(n: int, m: int) -> tuple[Tensor, Tensor]:
    """Number of each bit code (-1 where it is no candidate), and the bool entries of each candidate, in lexicographic order."""
    candidates = torch.zeros(math.comb(m, n), m, dtype=torch.bool)
    number_of_code = torch.full((2**m,), -1)
    for number, kept in enumerate(itertools.combinations(range(m), n)):
        candidates[number, list(kept)] = True
        number_of_code[sum(1 << entry for entry in kept)] = number
    return number_of_code, candidates
