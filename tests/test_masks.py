from __future__ import annotations

import pytest
import torch

from distiller.errors import CheckpointError
from distiller.masks import MaskRules, MaskStore, ParameterMasker, create_model_masks_dict

NAME = "conv2.weight"


@pytest.fixture
def masked(tiny_cnn):
    store = MaskStore(tiny_cnn)
    weight = tiny_cnn.conv2.weight
    mask = (torch.rand_like(weight) > 0.5).to(weight.dtype)
    return store, weight, mask


def test_an_unmasked_store_changes_nothing(tiny_cnn):
    before = {name: value.clone() for name, value in tiny_cnn.state_dict().items()}
    store = MaskStore(tiny_cnn)
    store.apply_before_forward()
    store.before_optimizer_step()
    store.apply_after_step()
    assert all(torch.equal(before[name], value) for name, value in tiny_cnn.state_dict().items())


def test_a_mask_zeroes_exactly_what_it_prunes(masked):
    store, weight, mask = masked
    dense = weight.detach().clone()
    store.put(NAME, mask)
    store.apply_before_forward()
    assert torch.equal(weight, dense * mask)


def test_masks_of_several_slots_multiply(masked):
    store, weight, mask = masked
    other = (torch.rand_like(weight) > 0.5).to(weight.dtype)
    store.put(NAME, mask)
    store.put(NAME, other, slot="regularizer l1")
    assert torch.equal(store[NAME].mask, mask * other)
    store.put(NAME, None)
    assert torch.equal(store[NAME].mask, other)


def test_what_the_optimizer_regrew_is_masked_after_its_step(masked):
    store, weight, mask = masked
    store.put(NAME, mask)
    store.apply_before_forward()
    weight.data.add_(1.0)
    store.apply_after_step()
    assert (weight[mask == 0] == 0).all()


def test_a_forward_only_mask_leaves_the_weights_dense_after_the_step(masked):
    store, weight, mask = masked
    store.put(NAME, mask, rules=MaskRules(forward_only=True))
    store.apply_before_forward()
    weight.data.add_(1.0)
    store.apply_after_step()
    assert (weight[mask == 0] == 1).all()


def test_a_forward_only_mask_is_in_force_within_applied_and_gone_afterwards(masked):
    store, weight, mask = masked
    dense = weight.detach().clone()
    store.put(NAME, mask, rules=MaskRules(forward_only=True))
    with store.applied():
        assert torch.equal(weight, dense * mask)
        with store.applied():
            assert torch.equal(weight, dense * mask)
        assert torch.equal(weight, dense * mask)
    assert torch.equal(weight, dense)


def test_double_copies_give_the_dense_weights_to_the_optimizer(masked):
    store, weight, mask = masked
    dense = weight.detach().clone()
    store.put(NAME, mask, rules=MaskRules(forward_only=True, double_copies=True))
    store.apply_before_forward()
    assert torch.equal(weight, dense * mask)
    store.before_optimizer_step()
    assert torch.equal(weight, dense)


def test_gradients_are_masked_where_asked(masked):
    store, weight, mask = masked
    store.put(NAME, mask, rules=MaskRules(forward_only=True, mask_gradients=True))
    weight.grad = torch.ones_like(weight)
    store.before_optimizer_step()
    assert torch.equal(weight.grad, mask)


def test_each_slot_acts_by_its_own_rules(masked):
    """The rules of one parameter's entry were those of who set its mask last."""
    store, weight, mask = masked
    gate = torch.full_like(mask, 0.5)
    gated = MaskRules(forward_only=True, double_copies=True, mask_gradients=True)
    for first, second in ((("gate", gate, gated), ("pruner", mask, MaskRules())), (("pruner", mask, MaskRules()), ("gate", gate, gated))):  # fmt: skip
        for slot, values, rules in (first, second):
            store.put(NAME, values, slot, rules)
        weight.data.fill_(2.0)
        weight.grad = torch.ones_like(weight)
        store.apply_before_forward()
        assert torch.equal(weight, 2 * mask * gate)
        store.before_optimizer_step()
        assert torch.equal(weight, torch.full_like(weight, 2.0))
        assert torch.equal(weight.grad, gate)
        weight.data.add_(1.0)
        store.apply_after_step()
        assert torch.equal(weight, 3 * mask)
        assert store[NAME].rules == gated


def test_rules_of_several_slots_survive_a_restart(masked, tiny_cnn):
    store, _, mask = masked
    store.put(NAME, mask, rules=MaskRules())
    store.put(NAME, mask, "gate", MaskRules(forward_only=True))
    restored = MaskStore(tiny_cnn)
    restored.load_state_dict(store.state_dict())
    assert restored[NAME].rules_of == {"pruner": MaskRules(), "gate": MaskRules(forward_only=True)}


def test_rules_without_a_slot_are_those_of_every_slot(masked, tiny_cnn):
    store, _, mask = masked
    rules = {"forward_only": True, "double_copies": False, "mask_gradients": False}
    store.load_state_dict({"masks": {NAME: {"pruner": mask, "gate": mask}}, "rules": {NAME: rules}})
    assert store[NAME].rules_of == dict.fromkeys(("pruner", "gate"), MaskRules(forward_only=True))


def test_state_survives_a_restart_with_the_dense_weights_behind_the_masks(masked, tiny_cnn):
    store, weight, mask = masked
    dense = weight.detach().clone()
    store.put(NAME, mask, rules=MaskRules(forward_only=True))
    with store.applied():
        state, weights = store.state_dict(), {k: v.clone() for k, v in tiny_cnn.state_dict().items()}
    assert state["masks"][NAME]["pruner"].dtype == torch.bool

    tiny_cnn.load_state_dict(weights)
    restored = MaskStore(tiny_cnn)
    restored.load_state_dict(state)
    assert torch.equal(weight, dense)
    assert torch.equal(restored[NAME].mask, mask)
    assert restored[NAME].rules == MaskRules(forward_only=True)


def test_masks_that_are_not_0_or_1_keep_their_values(masked):
    store, _, mask = masked
    store.put(NAME, mask * 2)
    assert torch.equal(store.state_dict()["masks"][NAME]["pruner"], mask * 2)


REAL = "must be a real tensor of the parameter's shape (6, 4, 3, 3), got"


@pytest.mark.parametrize(
    ("state", "text"),
    [
        ({"masks": {NAME: torch.ones(2)}}, f"masks['{NAME}']['pruner']: {REAL} shape (2,)"),
        ({"masks": {NAME: {"a": "x"}}}, f"masks['{NAME}']['a']: {REAL} str"),
        (
            {"masks": {"x.weight": torch.ones(2)}},
            "masks['x.weight']['pruner']: the model has no such parameter",
        ),
        (
            {"masks": {NAME: torch.full((6, 4, 3, 3), -1.0)}},
            f"masks['{NAME}']['pruner']: must not be negative, NaN or infinite",
        ),
        ({"masks": 3}, "masks: must be by parameter name, got int"),
        ({"dense": {NAME: torch.ones(2)}}, f"dense['{NAME}']: {REAL} shape (2,)"),
        ({"dense": {"x.weight": torch.ones(2)}}, "dense['x.weight']: the model has no such parameter"),
        (
            {"rules": {NAME: {"forward": True}}},
            f"rules['{NAME}']: must have true or false for forward_only, double_copies, mask_gradients, "
            "passing, "
            "got {'forward': True}",
        ),
        ({"rules": {"x.weight": {}}}, "rules['x.weight']: the model has no such parameter"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(masked, state, text):
    store, weight, mask = masked
    dense = weight.detach().clone()
    whole = {"masks": {NAME: mask}, "dense": {NAME: dense + 1}, "rules": {}}
    with pytest.raises(CheckpointError) as caught:
        store.load_state_dict(whole | state)
    assert str(caught.value) == text
    assert store.masked() == {}
    assert torch.equal(weight, dense)


def test_distillers_masker_is_there_under_its_name(tiny_cnn):
    masks = create_model_masks_dict(tiny_cnn)
    assert list(masks) == [name for name, _ in tiny_cnn.named_parameters()]
    masker = ParameterMasker("fc.bias")
    assert masker.mask is None
    masker.mask = torch.tensor([1.0, 0.0])
    assert masker.apply_mask(torch.tensor([3.0, 4.0])).tolist() == [3.0, 0.0]
