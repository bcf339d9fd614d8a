from __future__ import annotations

import torch

from distiller.channel_groups.ids import IdSpace, squeezed, stretched, varying_dims


def units(space: IdSpace, ids: torch.Tensor) -> list:
    return space.solve().unit_of[ids].tolist()


def test_new_ids_are_alone():
    space = IdSpace()
    ids = space.new(3)
    assert len(set(units(space, ids))) == 3


def test_united_ids_are_one_unit_through_a_chain():
    space = IdSpace()
    a, b, c = space.new(2), space.new(2), space.new(2)
    space.unite(a, b)
    space.unite(b, c)
    assert units(space, a) == units(space, c)
    assert len(set(units(space, a))) == 2


def test_uniting_broadcasts():
    space = IdSpace()
    channels, scale = space.new(4).reshape(1, 4, 1, 1).expand(1, 4, 9, 9), space.new(4).reshape(1, 4, 1, 1)
    space.unite(channels, scale)
    assert units(space, channels[0, :, 0, 0]) == units(space, scale[0, :, 0, 0])


def test_a_reason_and_a_note_are_of_the_whole_unit():
    space = IdSpace()
    a, b = space.new(2), space.new(2)
    space.unite(a, b)
    space.fix(a[:1], "first")
    space.fix(b[:1], "second")
    space.note(b[1:], "norm")
    solution = space.solve()
    first, second = solution.unit_of[b].tolist()
    assert solution.reasons == {first: "first"}
    assert solution.notes == {second: ("norm",)}


def test_what_differs_along_a_kept_dimension_cannot_be_removed():
    space = IdSpace()
    ids = space.new(2, 3)
    space.unite_along(ids, 0)
    space.keep_along(ids, [0], "rows")
    assert space.solve().reasons == {}
    space.keep_along(ids, [1], "columns")
    assert set(space.solve().reasons.values()) == {"columns"}


def test_what_comes_to_be_alike_later_may_be_removed():
    space = IdSpace()
    ids = space.new(2, 3)
    space.keep_along(ids, [0], "rows")
    space.unite_along(ids, 0)
    assert space.solve().reasons == {}


def test_ids_that_differ_along_two_dimensions_are_cut_along_the_longer():
    space = IdSpace()
    ids = space.new(2, 5)
    space.cut_as_slices(ids)
    rows = units(space, ids)
    assert rows[0] == rows[1]
    assert len(set(rows[0])) == 5


def test_ids_that_are_slices_already_stay_as_they_are():
    space = IdSpace()
    ids = space.new(2, 5)
    space.cut_as_slices(ids)
    space.unite_along(ids, 1)  # two heads of five channels
    rows = units(space, ids)
    assert rows[0] != rows[1]
    assert len(set(rows[0])) == 1


def test_stretching_finds_what_does_not_change():
    ids = torch.arange(3).reshape(1, 3, 1).expand(1, 3, 4).contiguous()
    assert stretched(ids).stride() == (12, 4, 0)
    assert torch.equal(stretched(ids), ids)
    assert squeezed(stretched(ids)).shape == (1, 3, 1)
    assert varying_dims(ids) == [1]
