import pickle

from distiller.replay import Variant
from distiller.sensitivity.units import Unit


def test_a_unit_can_be_sent_to_another_process():
    unit = Unit("element", "fc.weight", (0.5,), Variant)
    assert pickle.loads(pickle.dumps(unit)).note(0.5) == ""
