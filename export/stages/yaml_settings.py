"""Settings as files: YAML read strictly, single values set from the command line, and the recipes that come along."""

from collections.abc import Iterable, Mapping
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Final

import yaml

from sparsepass.graph.support import SparsepassError, closest, first_line, opened, path_named, shown

SUFFIX: Final = ".yaml"
EXAMPLE_FILE: Final = "example.yaml"


class _Strict(yaml.SafeLoader):
    """Plain YAML that refuses a key given twice (the first one would be lost in silence) and aliases (a few make gigabytes)."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "an alias is not read here", self.peek_event().start_mark)  # type: ignore[no-untyped-call]
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", key_node.start_mark)
            seen.add(key if isinstance(key, str) else id(key_node))
        return super().construct_mapping(node, deep)


def parse_settings(text: str, where: str) -> dict[str, Any]:
    """Read YAML that is a mapping.

    Args:
        text: The file's content.
        where: Its name, for errors.

    Raises:
        SparsepassError: If it is no YAML, no mapping, or a key is given twice; with the line.

    >>> parse_settings("train: {lr: 1.0e-4}", "recipe.yaml")
    {'train': {'lr': 0.0001}}
    """
    try:
        found = yaml.load(text, Loader=_Strict)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise SparsepassError(f"{where}{line}: {error.problem}; expected YAML, see `sparsepass run --example`") from error
    except RecursionError as error:
        raise SparsepassError(f"{where} is nested too deep; see `sparsepass run --example`") from error
    except (yaml.YAMLError, ValueError) as error:  # a date or a number that is none
        raise SparsepassError(f"{where} is no YAML ({first_line(error)}); see `sparsepass run --example`") from error
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise SparsepassError(f"{where} has to be YAML of the form `name: value`, see `sparsepass run --example`")
    return found


def recipe_names() -> tuple[str, ...]:
    """Names of the recipes that come with the package.

    >>> "smollm2-cpu" in recipe_names()
    True
    """
    return tuple(sorted(p.name.removesuffix(SUFFIX) for p in _recipes().iterdir() if p.name.endswith(SUFFIX)))


def read_recipe_text(name: str | Path) -> str:
    """Read a recipe: a file, or one that comes with the package, by name.

    Raises:
        SparsepassError: If there is none.
    """
    path = Path(name).expanduser()
    if path_named(str(name)) is not None and not path.is_dir():
        with opened(path) as file:
            content = file.read()
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise SparsepassError(f"{shown(path)} is no UTF-8 (byte {error.start}); write it as UTF-8") from error
    known = recipe_names()
    if str(name).removesuffix(SUFFIX) in known:
        return (_recipes() / f"{str(name).removesuffix(SUFFIX)}{SUFFIX}").read_text(encoding="utf-8")
    near = closest(name, known)
    hint = f"did you mean {near!r}? " if near else ""
    raise SparsepassError(f"there is no file {name}, and no recipe of that name; {hint}Recipes are {', '.join(known)}")


def example_text() -> str:
    """The commented example of a recipe.

    >>> example_text().startswith("# A recipe")
    True
    """
    return (resources.files("sparsepass.export.stages") / EXAMPLE_FILE).read_text(encoding="utf-8")


def override(settings: Mapping[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """Set single values: ``a.b=value``, the value as YAML.

    Args:
        settings: Nested settings; left as they are.
        assignments: Each ``path=value``.

    Raises:
        SparsepassError: If one has no ``=``, or its path leads through a plain value.

    >>> override({"train": {"lr": 1e-3}}, ["train.lr=2e-4", "train.frozen=[lm_head]"])
    {'train': {'lr': '2e-4', 'frozen': ['lm_head']}}
    """
    found = _copied(settings)
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals or not path.strip():
            raise SparsepassError(f"--set {assignment!r} cannot be read; expected name=value, such as train.lr=1e-4")
        try:
            value = yaml.load(text, Loader=_Strict)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise SparsepassError(f"--set {assignment!r}: the value is no YAML ({first_line(error)})") from error
        *parents, last = path.strip().split(".")
        place = found
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise SparsepassError(f"--set {assignment!r}: {parent} has a value, and no settings below it")
        place[last] = value
    return found


def refuse_unknown(names: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raise if a name is not known, and say the nearest one.

    Raises:
        SparsepassError: For the first unknown name.
    """
    expected = list(known)
    for name in names:
        if name not in expected:
            near = closest(name, expected)
            hint = f"; did you mean {near!r}?" if near else f" (there are {', '.join(expected)})"
            raise SparsepassError(f"{where}: there is no {name!r}{hint}")


def _recipes() -> Traversable:
    return resources.files("sparsepass.export.stages") / "recipes"


def _copied(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _copied(value) if isinstance(value, Mapping) else value for name, value in settings.items()}
