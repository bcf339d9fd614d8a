import pytest

from distiller.errors import QuantizationError
from distiller.quantization.data_steps import DataSteps


def test_no_steps_are_the_default():
    assert (
        DataSteps.from_plain(None) == DataSteps() == DataSteps.from_plain({"adaround": False, "lapq": None})
    )
    assert DataSteps().names == ()


def test_steps_are_in_the_order_in_which_they_are_done():
    steps = DataSteps.from_plain(
        {"bias_correction": True, "adaround": {"iterations": 5}, "cross_layer_equalization": True}
    )
    assert steps.names == ("cross_layer_equalization", "adaround", "bias_correction")
    assert steps.adaround == {"iterations": 5}
    assert steps.bias_correction == {}


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (3, "steps: must map steps to true or their settings, got 3"),
        ({"adaronud": True}, "steps: no step 'adaronud'; did you mean 'adaround'?"),
        ({"adaround": 7}, "steps.adaround: must be true, false or some of iterations, batch_size, learning_rate, "
                          "regularization, warm_start, beta, samples, scales, seed, got 7"),
        ({"adaround": {"iteration": 7}}, "steps.adaround: no setting 'iteration'; did you mean 'iterations'?"),
        ({"bias_correction": {"x": 1}}, "steps.bias_correction: no setting 'x'; it has none"),
        ({"bias_correction": 1.5}, "steps.bias_correction: must be true or false, got 1.5"),
        ({"mixed_precision": True}, "steps.mixed_precision: needs one budget of average_bits, weight_bytes, "
                                    "bit_operations, got none"),
        ({"mixed_precision": {"average_bits": 4, "weight_bytes": 9}},
         "steps.mixed_precision: needs one budget of average_bits, weight_bytes, bit_operations, "
         "got average_bits and weight_bytes"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_what_there_is(given, text):
    with pytest.raises(QuantizationError) as caught:
        DataSteps.from_plain(given)
    assert str(caught.value) == text
