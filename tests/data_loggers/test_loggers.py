import logging

import numpy as np
import pandas as pd
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distiller.data_loggers.loggers import (
    CsvLogger,
    EpochRecord,
    Logger,
    NullLogger,
    PythonLogger,
    TensorBoardLogger,
    result_line,
)
from distiller.errors import UsageError


def record(epoch: int, top1: float = 50.0) -> EpochRecord:
    return EpochRecord(
        epoch=epoch,
        lr=0.1,
        train_overall_loss=1.25,
        train_top1=48.0,
        train_top5=90.0,
        valid_loss=1.5,
        valid_top1=top1,
        valid_top5=91.0,
        sparsity=0.8,
        seconds=2.5,
    )


def log_every_event(logger: Logger) -> None:
    logger.log_training_step(2, 10, 100, {"Overall Loss": 0.5, "Top1": 51.5625, "LR": 0.1})
    logger.log_validation(2, loss=0.301, top1=91.25, top5=99.5)
    logger.log_weight_sparsity(2, {"conv1.weight": 0.25, "fc.weight": 0.5}, total=0.4)
    logger.log_kernel_sparsity(2, {"conv1.weight": 0.125})
    logger.log_parameter_histograms(
        2, {"conv1.weight": np.array([[1.0, 2.0], [2.0, np.inf]]), "none": np.ones(0)}
    )
    logger.log_activation_statistics(
        2, "valid", {"sparsity_ofm": {"relu1": 50.0, "relu2": 25.0}, "l1_channels": {"relu1": [1.0, 2.0]}}
    )
    logger.log_epoch(record(2))
    logger.close()


# --------------------------------------------------------------------------- python


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.DEBUG, logger="run")
    return logging.getLogger("run")


def test_python_logger_writes_distillers_lines(log, caplog):
    log_every_event(PythonLogger(log))
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("INFO", "Epoch: [2][   10/  100]    Overall Loss 0.500000    Top1 51.562500    LR 0.100000"),
        ("INFO", "==> Top1: 91.250    Top5: 99.500    Loss: 0.301"),
        ("DEBUG", "Sparsity of conv1.weight: 25.00"),
        ("DEBUG", "Sparsity of fc.weight: 50.00"),
        ("INFO", "Total sparsity: 40.00"),
        (
            "INFO",
            "Activations (valid, epoch 2; means over channels):\n"
            "+---------+----------------+---------------+\n"
            "| Layer   |   sparsity_ofm |   l1_channels |\n"
            "|---------+----------------+---------------|\n"
            "| relu1   |         50.000 |         1.500 |\n"
            "| relu2   |         25.000 |               |\n"
            "+---------+----------------+---------------+",
        ),
    ]


def test_a_layer_without_channels_to_average_has_an_empty_cell(log, caplog):
    PythonLogger(log).log_activation_statistics(0, "test", {"l1_channels": {"relu": []}})
    assert caplog.records[0].getMessage().splitlines()[-2] == "| relu    |               |"


def test_result_line_rounds_to_three_places():
    assert (
        result_line(loss=0.30149, top1=91.25, top5=100) == "==> Top1: 91.250    Top5: 100.000    Loss: 0.301"
    )


def test_null_logger_takes_every_event_and_says_nothing(caplog, capsys):
    log_every_event(NullLogger())
    assert caplog.records == []
    assert capsys.readouterr() == ("", "")


# ---------------------------------------------------------------------- tensorboard


def test_tensorboard_logger_writes_distillers_tags_and_steps(tmp_path):
    log_every_event(TensorBoardLogger(tmp_path))

    events = EventAccumulator(str(tmp_path)).Reload()
    found = {
        tag: [(e.step, round(e.value, 5)) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }
    assert found == {
        "Performance/Training/Overall Loss": [(210, 0.5)],  # 100 * 2 + 10
        "Performance/Training/Top1": [(210, 51.5625)],
        "Performance/Training/LR": [(210, 0.1)],
        "Performance/Validation/Loss": [(2, 0.301)],
        "Performance/Validation/Top1": [(2, 91.25)],
        "Performance/Validation/Top5": [(2, 99.5)],
        "sparsity/weights/conv1.weight": [(2, 25.0)],
        "sparsity/weights/fc.weight": [(2, 50.0)],
        "sparsity/weights/total": [(2, 40.0)],
        "sparsity-2D/weights/conv1.weight": [(2, 12.5)],
        "sparsity_ofm/activations/valid/relu1": [(2, 50.0)],
        "sparsity_ofm/activations/valid/relu2": [(2, 25.0)],
    }
    histograms = {
        tag: [(e.step, e.histogram_value.num, e.histogram_value.sum) for e in events.Histograms(tag)]
        for tag in events.Tags()["histograms"]
    }
    assert histograms == {
        "conv1/weight": [(2, 3, 5.0)],  # without the infinite one
        "l1_channels/activations/valid/relu1": [(2, 2, 3.0)],
    }


def test_a_parameter_has_a_histogram_for_each_epoch(tmp_path):
    """DEFECT of Distiller: numbered by the mini-batches of the epoch, each epoch overwrote the one before."""
    logger = TensorBoardLogger(tmp_path)
    for epoch in range(3):
        logger.log_parameter_histograms(epoch, {"fc.weight": np.full((2, 3), float(epoch))})
    logger.close()
    events = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0}).Reload()
    found = events.Histograms("fc/weight")
    assert [(event.step, event.histogram_value.sum) for event in found] == [(0, 0.0), (1, 6.0), (2, 12.0)]


def test_a_histogram_has_200_bins_as_in_distiller(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    logger.log_parameter_histograms(0, {"fc.weight": np.linspace(0, 1, 10_000)})
    logger.close()
    (event,) = EventAccumulator(str(tmp_path)).Reload().Histograms("fc/weight")
    assert sum(count > 0 for count in event.histogram_value.bucket) == 200


def test_tensorboard_has_a_finished_epoch_on_disk_before_it_is_closed(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    logger.log_validation(0, loss=1.0, top1=50.0, top5=90.0)
    logger.log_epoch(record(0))

    on_disk = EventAccumulator(str(tmp_path)).Reload().Tags()["scalars"]
    logger.close()
    assert "Performance/Validation/Top1" in on_disk


# ------------------------------------------------------------------------------ csv


def test_csv_has_a_row_an_epoch_with_the_fields_of_the_record(tmp_path):
    logger = CsvLogger(tmp_path)
    log_every_event(logger)
    assert logger.path == tmp_path / "epochs.csv"
    assert logger.path.read_text() == (
        "epoch,lr,train_overall_loss,train_top1,train_top5,valid_loss,valid_top1,valid_top5,sparsity,seconds\n"
        "2,0.1,1.25,48.0,90.0,1.5,50.0,91.0,0.8,2.5\n"
    )


def test_csv_row_is_on_disk_as_soon_as_the_epoch_is_over(tmp_path):
    logger = CsvLogger(tmp_path)
    for epoch in range(3):
        logger.log_epoch(record(epoch))
        assert pd.read_csv(tmp_path / "epochs.csv")["epoch"].tolist() == list(range(epoch + 1))


def test_csv_keeps_every_digit_of_a_number(tmp_path):
    value = 100 * 1 / 3
    CsvLogger(tmp_path).log_epoch(record(0, top1=value))
    assert float((tmp_path / "epochs.csv").read_text().splitlines()[1].split(",")[6]) == value


def test_csv_of_a_resumed_run_has_every_epoch_once(tmp_path):
    first = CsvLogger(tmp_path)
    for epoch in range(5):
        first.log_epoch(record(epoch, top1=epoch))

    resumed = CsvLogger(tmp_path)  # from the checkpoint of epoch 2
    for epoch in (3, 4, 5):
        resumed.log_epoch(record(epoch, top1=10 + epoch))

    table = pd.read_csv(tmp_path / "epochs.csv")
    assert table["epoch"].tolist() == [0, 1, 2, 3, 4, 5]
    assert table["valid_top1"].tolist() == [0, 1, 2, 13, 14, 15]


def test_csv_drops_the_rows_after_an_epoch_that_is_run_again(tmp_path):
    logger = CsvLogger(tmp_path)
    for epoch in (0, 1, 2, 1):
        logger.log_epoch(record(epoch, top1=epoch))
    assert pd.read_csv(tmp_path / "epochs.csv")["epoch"].tolist() == [0, 1]


def test_csv_keeps_finished_epochs_until_the_resumed_run_has_one(tmp_path):
    CsvLogger(tmp_path).log_epoch(record(0))
    CsvLogger(tmp_path)
    assert pd.read_csv(tmp_path / "epochs.csv")["epoch"].tolist() == [0]


def test_csv_cuts_off_a_row_that_a_killed_run_left_unfinished(tmp_path):
    CsvLogger(tmp_path).log_epoch(record(0))
    path = tmp_path / "epochs.csv"
    path.write_text(path.read_text() + "1,0.1,1.2")

    CsvLogger(tmp_path).log_epoch(record(1))
    assert pd.read_csv(path)["epoch"].tolist() == [0, 1]
    assert [p.name for p in tmp_path.iterdir()] == ["epochs.csv"]


@pytest.mark.parametrize("content", [b"", b"epoch,loss\n0,1\n", b"\x80\x00\xff", b"epoch,lr\n"])
def test_csv_refuses_to_overwrite_another_table(tmp_path, content):
    path = tmp_path / "epochs.csv"
    path.write_bytes(content)
    with pytest.raises(UsageError) as error:
        CsvLogger(tmp_path)
    assert str(error.value) == (
        f"{path}: not a table of epochs of this program; move it away or give another folder"
    )
    assert path.read_bytes() == content
