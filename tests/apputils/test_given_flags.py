from __future__ import annotations

from argparse import Namespace

from compress_classifier import make_parser
from distiller.apputils.given_flags import given_flags
from distiller.apputils.usage import check_usage


def test_flags_of_a_command_line_are_given_at_whatever_value():
    args = make_parser().parse_args(["--lr", "0.1", "--epochs", "3"])
    assert given_flags(args) == {"lr", "epochs"}


def test_settings_made_in_python_give_no_flag_unless_they_say_so():
    assert given_flags(Namespace(kd_temperature=4.0)) == frozenset()
    assert given_flags(Namespace(kd_temperature=1.0, given=["kd_temperature"])) == {"kd_temperature"}


def test_settings_made_in_python_can_be_checked():
    args = make_parser().parse_args([])
    del args.given
    args.kd_temperature = 4.0
    assert check_usage(args) == []
