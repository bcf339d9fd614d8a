"""Pictures of histograms."""

import matplotlib
import pytest
import torch

from distiller.data_loggers.histogram_plot import check_picture_kind, encoded, histogram_figure
from distiller.errors import UsageError


def figure(nbins=4):
    return histogram_figure(torch.arange(nbins), torch.arange(nbins).double(), "conv1: output")


@pytest.mark.parametrize(("kind", "start"), [(".svg", b"<?xml"), (".png", b"\x89PNG"), (".pdf", b"%PDF")])
def test_a_picture_is_of_its_kind_and_the_same_each_time(kind, start):
    once = encoded(figure(), kind)
    assert once.startswith(start)
    assert encoded(figure(), kind) == once


def test_the_title_says_what_it_is_of_and_the_axis_how_many():
    axes = figure().axes[0]
    assert (axes.get_title(), axes.get_ylabel()) == ("conv1: output", "Count of 6")
    assert axes.get_yscale() == "log"


def test_a_single_bin_is_drawn():
    assert encoded(figure(nbins=1), ".png")


def test_pyplot_is_left_alone():
    before = dict(matplotlib.rcParams)
    encoded(figure(), ".svg")
    assert dict(matplotlib.rcParams) == before


def test_an_unknown_kind_names_those_that_there_are():
    with pytest.raises(UsageError) as caught:
        check_picture_kind("png")
    assert str(caught.value) == "hist_imgs_ext: one of .svg, .png, .pdf wanted, got 'png'"
