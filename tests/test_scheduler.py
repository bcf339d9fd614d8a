from __future__ import annotations

import pytest
import torch
from torch import nn

from distiller.errors import CheckpointError, DistillerError, PolicyConflictError, UnknownNameError
from distiller.interfaces import EpochWindow, LossComponent, Policy, PolicyLoss
from distiller.policy import PruningPolicy
from distiller.pruning import AutomatedGradualPruner, SparsityLevelParameterPruner
from distiller.scheduler import CompressionScheduler, make_window
from tests.doubles import HalfPruner, every_other, train


class Diary(Policy):
    """Notes every call."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def on_epoch_begin(self, ctx):
        self.calls.append(("epoch begin", ctx.epoch))

    def on_minibatch_begin(self, ctx):
        self.calls.append(("minibatch begin", ctx.epoch, ctx.minibatch, ctx.minibatches_per_epoch))

    def before_backward_pass(self, ctx, loss):
        self.calls.append(("backward", ctx.epoch, ctx.minibatch))
        return PolicyLoss(loss + 1, (LossComponent("one", torch.tensor(1.0)),))

    def before_parameter_optimization(self, ctx):
        self.calls.append(("optimize", ctx.epoch, ctx.minibatch))

    def on_minibatch_end(self, ctx):
        self.calls.append(("minibatch end", ctx.epoch, ctx.minibatch))

    def on_epoch_end(self, ctx, metrics):
        self.calls.append(("epoch end", ctx.epoch, dict(metrics)))


def test_callbacks_reach_a_policy_in_its_epochs_only(tiny_cnn):
    scheduler, diary = CompressionScheduler(tiny_cnn), Diary()
    scheduler.add_policy(diary, starting_epoch=1, ending_epoch=4, frequency=2)
    train(tiny_cnn, scheduler, range(5), batches=1)
    assert diary.calls == [
        call
        for epoch in (1, 3)
        for call in (
            ("epoch begin", epoch),
            ("minibatch begin", epoch, 0, 1),
            ("backward", epoch, 0),
            ("optimize", epoch, 0),
            ("minibatch end", epoch, 0),
            ("epoch end", epoch, {"loss": 1.0, "top1": 50.0}),
        )
    ]


def test_losses_of_policies_add_up_and_their_parts_are_told(tiny_cnn):
    scheduler = CompressionScheduler(tiny_cnn)
    scheduler.add_policy(Diary(), epochs=[0])
    scheduler.add_policy(Diary(), epochs=[0])
    result = scheduler.before_backward_pass(0, 0, 1, torch.tensor(5.0), None, return_loss_components=True)
    assert result.overall_loss == 7.0
    assert [part.name for part in result.loss_components] == ["one", "one"]


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_masked_weights_are_zero_at_every_evaluation_also_without_an_active_policy(tiny_cnn, optimizer):
    options = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    scheduler = CompressionScheduler(tiny_cnn)
    scheduler.add_policy(PruningPolicy(HalfPruner("conv2.weight")), starting_epoch=1, ending_epoch=3)
    opt = optimizer(tiny_cnn.parameters(), lr=0.01, weight_decay=0.01, **options)
    assert train(tiny_cnn, scheduler, range(6), opt) == [0.0, 0.5, 0.5, 0.5, 0.5, 0.5]


def test_a_forward_only_mask_is_zero_at_evaluations_while_the_weights_train_on(tiny_cnn):
    scheduler = CompressionScheduler(tiny_cnn)
    policy = PruningPolicy(
        HalfPruner("conv2.weight"), {"mask_on_forward_only": True, "use_double_copies": True}
    )
    scheduler.add_policy(policy, starting_epoch=0, ending_epoch=5)
    assert train(tiny_cnn, scheduler, range(2)) == [0.5, 0.5]
    assert (tiny_cnn.conv2.weight != 0).all()


@pytest.mark.parametrize("keep", [True, False])
def test_keep_mask_makes_a_forward_only_mask_permanent(tiny_cnn, keep):
    """DEFECT of Distiller: with a frequency it waited for an epoch in which the policy does not act."""
    scheduler = CompressionScheduler(tiny_cnn)
    args = {"mask_on_forward_only": True, "keep_mask": keep}
    # frequency 2 of 0..3: Distiller waited for epoch 3, and kept nothing
    scheduler.add_policy(
        PruningPolicy(HalfPruner("conv2.weight"), args), starting_epoch=0, ending_epoch=4, frequency=2
    )
    # Evaluated and saved is the pruned model in either case, also after the policy's last epoch.
    assert train(tiny_cnn, scheduler, range(5)) == [0.5] * 5
    assert bool((tiny_cnn.conv2.weight == 0).any()) == keep


def test_discarded_masks_last_one_minibatch(tiny_cnn):
    scheduler = CompressionScheduler(tiny_cnn)
    args = {
        "discard_masks_at_minibatch_end": True,
        "use_double_copies": True,
        "mask_on_forward_only": True,
        "mask_gradients": True,
        "mini_batch_pruning_frequency": 2,
    }
    pruner = HalfPruner("conv2.weight")
    scheduler.add_policy(PruningPolicy(pruner, args), epochs=[0])
    assert train(tiny_cnn, scheduler, range(1), batches=5) == [0.0]
    assert len(pruner.epochs) == 3  # at the beginning, and in mini-batches 2 and 4
    assert (tiny_cnn.conv2.weight != 0).all()


def test_flags_of_two_pruning_policies_do_not_mix(tiny_cnn):
    """DEFECT of Distiller: the flags of the policy that came last acted on every parameter."""
    scheduler = CompressionScheduler(tiny_cnn)
    scheduler.add_policy(PruningPolicy(HalfPruner("conv2.weight")), starting_epoch=0, ending_epoch=2)
    scheduler.add_policy(
        PruningPolicy(HalfPruner("fc.weight"), {"mask_on_forward_only": True}),
        starting_epoch=0,
        ending_epoch=2,
    )
    train(tiny_cnn, scheduler, range(1))
    assert (tiny_cnn.conv2.weight == 0).float().mean() == 0.5
    assert (tiny_cnn.fc.weight != 0).all()


def test_double_copies_of_two_policies_stay_dense(tiny_cnn):
    """DEFECT of Distiller: a second policy saved the masked weights as the dense ones."""
    scheduler = CompressionScheduler(tiny_cnn)
    for name in ("conv2.weight", "fc.weight"):
        args = {"mask_on_forward_only": True, "use_double_copies": True}
        scheduler.add_policy(PruningPolicy(HalfPruner(name), args), epochs=[0])
    train(tiny_cnn, scheduler, range(1), batches=3)
    assert (tiny_cnn.conv2.weight != 0).all()
    assert (tiny_cnn.fc.weight != 0).all()


def test_skip_first_minibatch_computes_masks_again_in_the_second(tiny_cnn):
    pruner = HalfPruner("conv2.weight")
    scheduler = CompressionScheduler(tiny_cnn)
    scheduler.add_policy(
        PruningPolicy(pruner, {"skip_first_minibatch": True}), starting_epoch=0, ending_epoch=2
    )
    train(tiny_cnn, scheduler, range(2), batches=3)
    assert pruner.epochs == [0, 0, 1]


def test_two_pruners_of_a_parameter_in_overlapping_epochs_conflict(tiny_cnn):
    scheduler = CompressionScheduler(tiny_cnn)
    scheduler.add_policy(
        PruningPolicy(HalfPruner("conv2.weight")), starting_epoch=0, ending_epoch=10, name="a"
    )
    with pytest.raises(PolicyConflictError) as caught:
        scheduler.add_policy(
            PruningPolicy(HalfPruner("conv?.weight")), starting_epoch=9, ending_epoch=20, name="b"
        )
    assert str(caught.value) == (
        "'a' (epochs 0..9) and 'b' (epochs 9..19) both prune 'conv2.weight'; let one end before the other begins"
    )


def test_pruners_may_follow_each_other_on_a_parameter(tiny_cnn):
    scheduler = CompressionScheduler(tiny_cnn)
    scheduler.add_policy(PruningPolicy(HalfPruner("conv2.weight")), starting_epoch=0, ending_epoch=2)
    scheduler.add_policy(PruningPolicy(HalfPruner("conv2.weight")), starting_epoch=2, ending_epoch=4)
    assert train(tiny_cnn, scheduler, range(4)) == [0.5] * 4


def test_a_policy_that_names_what_is_not_there_is_refused(tiny_cnn):
    with pytest.raises(UnknownNameError, match="did you mean 'conv2.weight'"):
        CompressionScheduler(tiny_cnn).add_policy(PruningPolicy(HalfPruner("conv2.weigth")), epochs=[0])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((None, None, None), "needs 'epochs', or 'starting_epoch' and 'ending_epoch'"),
        (([0], 0, 1), "both 'epochs' and 'starting_epoch'/'ending_epoch' given; give one"),
        (([], None, None), "'epochs' must be ascending epoch numbers from 0, got []"),
        (([3, 1], None, None), "'epochs' must be ascending epoch numbers from 0, got [3, 1]"),
        ((None, 5, 5), "needs 0 <= starting_epoch < ending_epoch, got starting_epoch 5 and ending_epoch 5"),
        ((None, 0, 4, 5), "'frequency' must be from 1 to ending_epoch - starting_epoch = 4, got 5"),
        (
            ([0, 2], None, None, 2),
            "'frequency' is for 'starting_epoch' and 'ending_epoch', got it with 'epochs'",
        ),
        ((None, 0, 10**30), f"'ending_epoch' must be at most 1,000,000,000, got {10**30:,}"),
        ((None, 10**12, 10**12 + 1), "'starting_epoch' must be at most 1,000,000,000, got 1,000,000,000,000"),
        (([3, 10**12], None, None), "'epochs' must be at most 1,000,000,000, got 1,000,000,000,000"),
    ],
)
def test_epochs_that_make_no_window_are_refused(arguments, text):
    with pytest.raises(DistillerError) as caught:
        make_window(*arguments)
    assert str(caught.value) == text


def test_progress_of_a_window_is_distillers():
    for start, end, frequency in [(0, 30, 2), (5, 20, 3), (1, 3, 1)]:
        window = make_window(None, start, end, frequency)
        span = ((end - start - 1) // frequency) * frequency
        assert [window.progress(epoch) for epoch in window.epochs] == [
            (epoch - start) / span for epoch in range(start, end, frequency)
        ]
    assert EpochWindow((7,)).progress(7) == 1.0


def test_state_survives_a_restart(tiny_cnn):
    def build():
        scheduler = CompressionScheduler(tiny_cnn)
        scheduler.add_policy(
            PruningPolicy(HalfPruner("conv2.weight")), starting_epoch=0, ending_epoch=4, name="p"
        )
        return scheduler

    scheduler = build()
    train(tiny_cnn, scheduler, range(2))
    again = build()
    again.load_state_dict(scheduler.state_dict())
    assert again.policies[0].policy.pruner.epochs == [0, 1]
    assert torch.equal(again.masks["conv2.weight"].mask, scheduler.masks["conv2.weight"].mask)


def test_the_state_of_another_schedule_is_refused(tiny_cnn):
    scheduler = CompressionScheduler(tiny_cnn)
    scheduler.add_policy(Diary(), epochs=[0], name="a")
    other = CompressionScheduler(tiny_cnn)
    other.add_policy(Diary(), epochs=[0], name="b")
    with pytest.raises(
        CheckpointError, match=r"policies \['a'\], this one has \['b'\]; resume with the same"
    ):
        other.load_state_dict(scheduler.state_dict())


def test_masks_to_start_from_may_have_the_names_of_a_data_parallel_model(tiny_cnn):
    mask = torch.zeros(6, 4, 3, 3)
    scheduler = CompressionScheduler(tiny_cnn, {"module.conv2.weight": mask})
    assert torch.equal(scheduler.masks.masked()["conv2.weight"], mask)


def test_masks_to_start_from_may_be_distillers(tiny_cnn):
    mask = every_other(tiny_cnn.fc.weight)
    scheduler = CompressionScheduler(tiny_cnn, {"fc.weight": mask, "fc.bias": None})
    scheduler.mask_all_weights()
    assert (tiny_cnn.fc.weight == 0).float().mean() == 0.5


def test_pruning_is_complete_when_the_last_pruner_has_run_its_last_epoch(tiny_cnn):
    scheduler = CompressionScheduler(tiny_cnn)
    assert scheduler.pruning_is_complete(0)
    policy = PruningPolicy(HalfPruner("conv2.weight"))
    scheduler.add_policy(policy, starting_epoch=0, ending_epoch=10, frequency=4)
    assert [epoch for epoch in range(12) if scheduler.pruning_is_complete(epoch)] == [8, 9, 10, 11]
    assert scheduler.sched_metadata == {policy: {"starting_epoch": 0, "ending_epoch": 10, "frequency": 4}}


def test_pruning_is_complete_as_soon_as_the_final_sparsity_is_aimed_at(tiny_cnn):
    scheduler = CompressionScheduler(tiny_cnn)
    level = SparsityLevelParameterPruner("level", {"conv2.weight": 0.5})
    scheduler.add_policy(PruningPolicy(level), starting_epoch=2, ending_epoch=30)
    assert [epoch for epoch in range(4) if scheduler.pruning_is_complete(epoch)] == [2, 3]
    agp = AutomatedGradualPruner("agp", 0.1, 0.5, ["fc.weight"])
    scheduler.add_policy(PruningPolicy(agp), starting_epoch=0, ending_epoch=7, frequency=3)
    assert [epoch for epoch in range(9) if scheduler.pruning_is_complete(epoch)] == [6, 7, 8]


def test_policies_that_will_do_nothing_or_not_all_are_told(tiny_cnn):
    scheduler = CompressionScheduler(tiny_cnn)
    agp = PruningPolicy(AutomatedGradualPruner("agp", 0.1, 0.5, ["fc.weight"]))
    scheduler.add_policy(agp, starting_epoch=2, ending_epoch=10**9, frequency=4, name="pruner agp")
    scheduler.add_policy(PruningPolicy(HalfPruner("conv2.weight")), epochs=[0, 1], name="pruner half")
    assert scheduler.idle_notes(0, 6) == [
        "pruner agp: does not come to its final sparsity, which it has in epoch 999999998; "
        "trained are epochs 0..5"
    ]
    assert scheduler.idle_notes(3, 6) == [
        "pruner agp: does nothing, it acts in epochs 2..999999998 and trained are epochs 3..5",
        "pruner half: does nothing, it acts in epochs 0..1 and trained are epochs 3..5",
    ]


def test_metrics_may_have_distillers_names(tiny_cnn):
    scheduler = CompressionScheduler(tiny_cnn)
    recorder = Diary()
    scheduler.add_policy(recorder, epochs=[0])
    scheduler.on_epoch_end(0, None, {"min": 0.5, "max": 80.0})
    assert recorder.calls == [("epoch end", 0, {"loss": 0.5, "top1": 80.0})]


def test_a_state_of_other_settings_is_refused_and_of_other_epochs_goes_on(tiny_cnn, caplog):
    def scheduler(**changes):
        made = CompressionScheduler(tiny_cnn)
        settings = {"class": "HalfPruner", "weights": ["fc.weight"], "level": 0.5} | changes
        settings = {key: value for key, value in settings.items() if value is not None}
        end = settings.pop("end", 9)
        policy = PruningPolicy(HalfPruner("fc.weight"))
        made.add_policy(policy, starting_epoch=0, ending_epoch=end, name="pruner p", settings=settings)
        return made

    state = scheduler().state_dict()
    scheduler().load_state_dict(state)
    assert not caplog.records
    for changes, text in [
        ({"level": 0.6}, "level 0.5, the schedule has 0.6;"),
        ({"class": "NMPruner"}, "class 'HalfPruner', the schedule has 'NMPruner';"),
        ({"level": None}, "level 0.5, the schedule has no such setting;"),
        ({"more": 1}, "more no such setting, the schedule has 1;"),
    ]:
        with pytest.raises(CheckpointError) as caught:
            scheduler(**changes).load_state_dict(state)
        assert str(caught.value).startswith(f"'pruner p': the checkpoint was written with {text}")
    scheduler(end=12).load_state_dict(state)
    assert caplog.messages == [
        "'pruner p': the checkpoint was written with epochs 0..8 (every 1), the schedule has 0..11 (every 1); "
        "it goes on with the schedule's"
    ]


def test_a_data_parallel_model_is_scheduled_by_the_names_of_the_plain_one(tiny_cnn):
    scheduler = CompressionScheduler(nn.DataParallel(tiny_cnn))
    scheduler.add_policy(PruningPolicy(HalfPruner("module.conv2.weight")), epochs=[0])
    assert train(tiny_cnn, scheduler, range(2)) == [0.5, 0.5]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda s: CompressionScheduler(None),
            "CompressionScheduler: model: must be a torch.nn.Module, got NoneType",
        ),
        (
            lambda s: CompressionScheduler(5),
            "CompressionScheduler: model: must be a torch.nn.Module, got int",
        ),
        (
            lambda s: CompressionScheduler(s.model, 5),
            "CompressionScheduler: zeros_mask_dict: must be a dict or None, got int",
        ),
        (lambda s: s.add_policy(None, epochs=[0]), "add_policy: policy: must be a Policy, got NoneType"),
        (lambda s: s.add_policy(object(), epochs=[0]), "add_policy: policy: must be a Policy, got object"),
        (lambda s: s.on_epoch_begin("x"), "on_epoch_begin: epoch: must be a whole number, got str"),
        (lambda s: s.on_epoch_begin(-1), "on_epoch_begin: epoch: must be 0 or more, got -1"),
        (lambda s: s.load_state_dict(5), "load_state_dict: state: must be a dict, got int"),
        (
            lambda s: s.load_state_dict({}),
            "load_state_dict: needs 'masks', as state_dict() gives it, got an empty dict",
        ),
        (
            lambda s: s.load_state_dict({"masks_dict": {}}),
            "load_state_dict: needs 'masks', as state_dict() gives it, got 'masks_dict'",
        ),
        (
            lambda s: s.load_state_dict({"masks": {}, "policies": 5}),
            "load_state_dict: policies: must be a list, got int",
        ),
        (
            lambda s: s.load_state_dict({"masks": {}, "policies": [5]}),
            "load_state_dict: policies[0]: must be a dict with 'name' and 'state', got int",
        ),
    ],
)
def test_arguments_of_another_type_are_refused(tiny_cnn, call, text):
    with pytest.raises(DistillerError) as caught:
        call(CompressionScheduler(tiny_cnn))
    assert str(caught.value) == text
