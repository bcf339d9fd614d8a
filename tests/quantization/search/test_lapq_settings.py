from __future__ import annotations

import pytest

from distiller.errors import QuantizationError
from distiller.quantization.clipping import ClipMode
from distiller.quantization.search.lapq_settings import LapqSettings


def test_names_are_read_in_any_case():
    settings = LapqSettings(method="nelder-mead", init_method="POWELL", init_mode="laplace")
    assert (settings.method, settings.init_method) == ("Nelder-Mead", "Powell")
    assert settings.modes(()) == {"": ClipMode.LAPLACE}
    assert LapqSettings(init_method="Quadratic", init_mode="none").init_method == "quadratic"


def test_starts_by_layer_leave_the_others_at_none():
    settings = LapqSettings(init_mode={"conv1": "L2", "fc": "AVG"})
    assert settings.modes(("conv1", "fc")) == {"": ClipMode.NONE, "conv1": 2.0, "fc": ClipMode.AVG}


def test_limits_are_no_part_of_a_searchs_identity():
    """A search that ended at a limit can be gone on with."""
    limits = {"maxiter": 3, "maxfev": 100, "basinhopping_niter": 5}
    assert LapqSettings(**limits).identity() == LapqSettings().identity()
    others = [LapqSettings(method="COBYLA"), LapqSettings(init_mode="L2"), LapqSettings(search_clipping=True)]
    assert all(other.identity() != LapqSettings().identity() for other in others)


METHODS = "Powell, Nelder-Mead, COBYLA, COBYQA, CG, BFGS, L-BFGS-B, TNC, SLSQP, trust-constr"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"method": "Powel"}, f"method: must be one of {METHODS}, got 'Powel'; did you mean 'Powell'?"),
        ({"init_method": 3}, f"init_method: must be one of {METHODS}, quadratic, got 3"),
        ({"maxiter": 0}, "maxiter: must be a whole number from 1 on, got 0"),
        ({"maxfev": True}, "maxfev: must be a whole number from 1 on, got True"),
        ({"basinhopping_niter": "100"}, "basinhopping_niter: must be a whole number from 1 on, got '100'"),
        ({"basinhopping": 1}, "basinhopping: must be true or false, got 1"),
        ({"search_clipping": "no"}, "search_clipping: must be true or false, got 'no'"),
        ({"minimizer_kwargs": [1]}, "minimizer_kwargs: must be a mapping, got [1]"),
        (
            {"minimizer_kwargs": {"x0": 1}},
            "minimizer_kwargs: 'x0' cannot be given; give options, tol, bounds, constraints, jac, hess, hessp",
        ),
        (
            {"minimizer_kwargs": {"option": {}}},
            "minimizer_kwargs: 'option' cannot be given; did you mean 'options'?",
        ),
        (
            {"init_method": "quadratic", "init_mode": "L2"},
            "init_method 'quadratic' chooses the norm, init_mode 'L2' gives it; leave one of them out",
        ),
        (
            {"init_mode": {"fc": "L"}},
            "init_mode['fc']: must be one of NONE, AVG, N_STD, GAUSS, LAPLACE, got 'L'; "
            "norms (L1, L2, L2.5, ...) and functions are taken, too",
        ),
    ],
)
def test_wrong_settings_are_refused(arguments, text):
    """The number of hops as text is what Distiller's flag gave (a defect there)."""
    with pytest.raises(QuantizationError) as caught:
        LapqSettings(**arguments)
    assert str(caught.value) == f"ptq_coordinate_search: {text}"


def test_a_start_for_a_layer_that_is_not_there_is_refused():
    with pytest.raises(QuantizationError) as caught:
        LapqSettings(init_mode={"conv2": "L2"}).modes(("conv1", "fc"))
    assert str(caught.value) == (
        "ptq_coordinate_search: init_mode: no quantized layer 'conv2'; did you mean 'conv1'?"
    )
