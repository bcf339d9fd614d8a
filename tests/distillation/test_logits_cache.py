from __future__ import annotations

import io
import logging

import pytest
import torch

from distiller.distillation.logits_cache import LogitsCache, digests


class Asked:
    """Answers each image with its sum, and its sum squared; notes how many images it was asked for."""

    def __init__(self):
        self.images = 0

    def __call__(self, images):
        self.images += len(images)
        total = images.flatten(1).sum(1)
        return torch.stack([total, total**2], 1)[:, None]


def images(*numbers):
    return torch.stack([torch.full((1, 2, 2), float(number)) for number in numbers])


def test_an_image_is_computed_once_whatever_the_order_of_images():
    cache, asked = LogitsCache(), Asked()
    wanted = [(1, 2, 3), (3, 1, 4), (4, 4, 2), (5, 6, 1)]
    for numbers in wanted:
        answers = cache.fetch(images(*numbers), asked)
        assert torch.equal(answers, Asked()(images(*numbers)))
    assert asked.images == 6
    assert len(cache) == 6


def test_what_was_computed_first_comes_back_bit_for_bit():
    cache = LogitsCache()
    first = cache.fetch(images(1, 2), lambda batch: torch.rand(len(batch), 1, 3))
    again = cache.fetch(images(2, 1), lambda batch: torch.rand(len(batch), 1, 3))
    assert torch.equal(again, first.flip(0))


def test_an_image_twice_in_a_mini_batch_is_kept_once():
    cache = LogitsCache()
    cache.fetch(images(1, 1, 1), Asked())
    assert len(cache) == 1


def test_a_digest_is_of_bytes_shape_and_type_and_not_of_the_layout():
    batch = torch.randn(3, 2, 4, 5)
    assert digests(batch) == digests(batch.contiguous(memory_format=torch.channels_last))
    assert digests(batch) == digests(batch[[2, 0, 1]])[1:] + digests(batch[2:])
    zeros = [torch.zeros(1, 2, 8), torch.zeros(1, 4, 4), torch.zeros(1, 4, 4, dtype=torch.int32)]
    assert len({digests(tensor)[0] for tensor in zeros}) == 3
    almost = batch.clone()
    almost[1, 0, 0, 0] = torch.nextafter(almost[1, 0, 0, 0], torch.tensor(9.0))
    assert [a == b for a, b in zip(digests(batch), digests(almost), strict=True)] == [True, False, True]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.bool])
def test_images_of_any_type_have_digests(dtype):
    batch = (torch.arange(8).reshape(2, 4) > 2).to(dtype)
    first, second = digests(batch)
    assert first != second


def test_nothing_is_added_past_the_bound_and_answers_stay_right():
    cache, asked = LogitsCache(most_bytes=3 * (2 * 4 + 16)), Asked()
    for _ in range(2):
        assert torch.equal(cache.fetch(images(1, 2, 3, 4, 5), asked), Asked()(images(1, 2, 3, 4, 5)))
    assert len(cache) == 3
    assert asked.images == 5 + 2


def test_it_ends_by_itself_when_images_do_not_come_back(caplog):
    cache, asked = LogitsCache(), Asked()
    with caplog.at_level(logging.INFO, logger="distiller"):
        for epoch in range(4):
            cache.fetch(images(*range(8 * epoch, 8 * epoch + 8)), asked)
            cache.end_epoch()
            assert cache.is_on == (epoch < 1)
    assert len(cache) == 0
    assert [record.getMessage() for record in caplog.records] == [
        "the teacher's answers are no longer kept: only 0 of the 8 images of an epoch had been seen before, as "
        "is so when images are augmented"
    ]


def test_it_stays_where_a_quarter_of_the_images_come_back():
    """Flipped at random, half of them do in the second epoch, and more later."""
    cache = LogitsCache()
    cache.fetch(images(1, 2, 3, 4), Asked())
    cache.end_epoch()
    cache.fetch(images(1, 12, 13, 14), Asked())
    cache.end_epoch()
    assert cache.is_on


def test_it_goes_on_through_a_restart():
    cache, asked = LogitsCache(), Asked()
    cache.fetch(images(1, 2, 3), asked)
    cache.end_epoch()
    file = io.BytesIO()
    torch.save(cache.state_dict(), file)
    file.seek(0)
    fresh = LogitsCache()
    fresh.load_state_dict(torch.load(file, weights_only=True))
    for each in (cache, fresh):
        each.fetch(images(4, 2, 1), Asked())
    ours, theirs = cache.state_dict(), fresh.state_dict()
    assert torch.equal(ours["digests"], theirs["digests"])
    assert torch.equal(ours["answers"], theirs["answers"])
    assert (ours["epochs"], ours["is_on"]) == (theirs["epochs"], theirs["is_on"]) == (1, True)


def test_an_empty_one_has_a_state_too():
    cache = LogitsCache()
    cache.load_state_dict(LogitsCache().state_dict())
    assert cache.state_dict() == {"digests": None, "answers": None, "epochs": 0, "is_on": True}
