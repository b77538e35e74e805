"""Docstrings as data: the section Attributes of a class."""

from sparsepass._docs import attribute_docs


class Base:
    """A base class.

    Attributes:
        kept: Said here only.
        changed: Said by the base class.
    """


class Derived(Base):
    """A class.

    Args:
        other: No attribute.

    Attributes:
        one: On one line: with a colon, and ``code``.
        several: Begins here
            and goes on
            for three lines.
        changed: Said anew.

    Raises:
        ValueError: No attribute either.
    """


class Silent:
    pass


class Inheriting(Derived):
    pass


def test_a_section_becomes_field_and_text() -> None:
    found = {
        "kept": "Said here only.",
        "changed": "Said anew.",
        "one": "On one line: with a colon, and ``code``.",
        "several": "Begins here and goes on for three lines.",
    }
    assert attribute_docs(Derived) == attribute_docs(Inheriting) == found
    assert list(attribute_docs(Base)) == ["kept", "changed"]
    assert attribute_docs(Silent) == {}
