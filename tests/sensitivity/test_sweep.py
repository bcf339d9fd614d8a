import pytest
import torch

from distiller.errors import SensitivityError, UsageError
from distiller.sensitivity.engine import perform_sensitivity_analysis
from distiller.sensitivity.report import sensitivities_from_csv
from distiller.sensitivity.sweep import sensitivity_sweep


class Evaluation:
    """Real outputs on fixed images, counted."""

    def __init__(self) -> None:
        self.calls = 0
        self.images = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(1))

    def __call__(self, *, model):
        self.calls += 1
        with torch.no_grad():
            loss = model(self.images).square().mean().item()
        return 100 / (1 + loss), 100.0, loss


def test_a_sweep_gives_what_distillers_function_gives(model, tmp_path):
    levels = (0.0, 0.3, 0.6)

    curves = sensitivity_sweep(model, "filter", levels, Evaluation(), tmp_path, test_images=8)

    assert curves == perform_sensitivity_analysis(model, ["*"], levels, Evaluation(), "filter")
    assert curves == sensitivities_from_csv(tmp_path / "sensitivity.csv")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sensitivity.csv", "sensitivity.json"]


def test_dense_point_is_measured_once_even_if_the_range_leaves_it_out(model, tmp_path):
    evaluation = Evaluation()

    curves = sensitivity_sweep(model, "channel", (0.5,), evaluation, tmp_path, test_images=8)

    assert evaluation.calls == 1 + 2
    assert [list(points) for points in curves.values()] == [[0.0, 0.5], [0.0, 0.5]]


def test_a_finished_sweep_is_not_measured_again(model, tmp_path):
    first = sensitivity_sweep(model, "element", (0.5,), Evaluation(), tmp_path, test_images=8)
    evaluation = Evaluation()

    assert sensitivity_sweep(model, "element", (0.5,), evaluation, tmp_path, test_images=8) == first
    assert evaluation.calls == 0


@pytest.mark.parametrize("calls", range(1, 6))
def test_a_sweep_that_failed_anywhere_goes_on_with_the_point_it_failed_at(model, tmp_path, calls):
    class Failing(Evaluation):
        def __call__(self, *, model):
            if self.calls == calls - 1:
                raise RuntimeError("out of memory")
            return super().__call__(model=model)

    with pytest.raises(RuntimeError):
        sensitivity_sweep(model, "channel", (0.25, 0.5), Failing(), tmp_path, test_images=8)
    evaluation = Evaluation()
    curves = sensitivity_sweep(model, "channel", (0.25, 0.5), evaluation, tmp_path, test_images=8)

    assert evaluation.calls == 5 - (calls - 1)
    assert curves == perform_sensitivity_analysis(model, ["*"], (0.0, 0.25, 0.5), Evaluation(), "channel")


def test_progress_counts_the_points_of_an_earlier_run(model, tmp_path):
    seen = []
    sensitivity_sweep(
        model, "channel", (0.5,), Evaluation(), tmp_path, 8, on_point=lambda *progress: seen.append(progress)
    )

    assert [(point.parameter, point.level, done, total) for point, done, total in seen] == [
        ("conv2.weight", 0.0, 1, 4),
        ("conv2.weight", 0.5, 2, 4),
        ("conv3.weight", 0.0, 3, 4),
        ("conv3.weight", 0.5, 4, 4),
    ]


def test_another_model_is_refused(model, tmp_path):
    sensitivity_sweep(model, "channel", (0.5,), Evaluation(), tmp_path, test_images=8)
    with torch.no_grad():
        model.bn.running_mean += 1

    with pytest.raises(SensitivityError, match=r"the folder holds another sweep, weights: "):
        sensitivity_sweep(model, "channel", (0.5,), Evaluation(), tmp_path, test_images=8)


def test_a_sweep_of_nothing_leaves_no_files(model, tmp_path):
    with pytest.raises(UsageError):
        sensitivity_sweep(model, "filter", (0.5,), Evaluation(), tmp_path, 8, net_params=["fc.*"])

    assert not list(tmp_path.iterdir())
