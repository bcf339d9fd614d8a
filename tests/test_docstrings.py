from __future__ import annotations

from distiller.docstrings import read_arguments, read_docstring


class Full:
    """One sentence, which goes on
    in a second line.

    A paragraph:

        a formula

    Another one.

    Args:
        first: what it is,
            and more of it.
        second: a list: of things.

            A second paragraph of it.
        third: the last.

    Raises:
        ValueError: never.

    Source: Somebody, "A paper"
    (arXiv 0000.00000), section 1.

    Not the source any more.
    """


class ByReference:
    """A sentence.

    As `Full`, with the arguments and errors of `Full`.
    """


class Record:
    """A sentence.

    Attributes:
        field: a value.
    """


class Bare(Full):
    pass


def test_the_first_paragraph_is_the_summary_on_one_line():
    assert read_docstring(Full).summary == "One sentence, which goes on in a second line."


def test_the_text_keeps_its_lines():
    assert read_docstring(Full).text == "A paragraph:\n\n    a formula\n\nAnother one."


def test_arguments_are_joined_to_one_line_each():
    assert read_docstring(Full).arguments == {
        "first": "what it is, and more of it.",
        "second": "a list: of things. A second paragraph of it.",
        "third": "the last.",
    }


def test_the_source_is_one_paragraph():
    assert read_docstring(Full).source == 'Somebody, "A paper" (arXiv 0000.00000), section 1.'


def test_attributes_stand_for_arguments_where_there_are_none():
    assert read_docstring(Record).arguments == {"field": "a value."}


def test_a_docstring_is_not_inherited():
    assert read_docstring(Bare).summary == ""
    assert read_docstring(Bare).arguments == {}


def test_arguments_may_be_those_of_another_class():
    assert read_arguments(ByReference, {"Full": Full}) == read_docstring(Full).arguments


def test_a_reference_to_an_unknown_class_gives_nothing():
    assert read_arguments(ByReference, {}) == {}
