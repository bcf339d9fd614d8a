"""Each flag of quantization after training, through the job: what it does, what it leaves, what reloads."""

from __future__ import annotations

import logging
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from distiller.apputils import classifier_jobs as jobs
from distiller.apputils import quantize_job, statistics_job
from distiller.apputils.image_classifier import ClassifierCompressor
from distiller.apputils.quantization_steps import RECORD
from distiller.errors import QuantizationError, ScheduleError, UsageError
from distiller.names import canonical_state_dict
from distiller.quantization import with_data as steps_module

pytestmark = pytest.mark.usefixtures("global_settings_restored", "untimed")
ARCH = "--arch tests.apputils.test_quantize_job:net "
QUANTIZE = ARCH + "--qe-calibration 0.05 -e --qe "
IMAGES = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(3))


class Net(nn.Module):
    """A ReLU6 between layers that can be equalized, layers without a bias, and a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.relu1, self.relu2 = nn.ReLU6(), nn.ReLU()
        self.conv2 = nn.Conv2d(4, 6, 3, padding=1, bias=False)
        self.conv3 = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.pool, self.fc = nn.MaxPool2d(4), nn.Linear(24, 10)

    def forward(self, x):
        x = self.conv2(self.relu1(self.bn1(self.conv1(x))))
        return self.fc(self.pool(self.relu2(x + self.conv3(x))).flatten(1))


def net(num_classes: int, in_channels: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net()
        model.bn1.bias.data += 2.0
        model.bn1.weight.data *= 4.0
    return model


@pytest.fixture
def quantized(monkeypatch):
    """Runs the job, returns the model that it made."""
    made: list[ClassifierCompressor] = []

    class Kept(ClassifierCompressor):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(jobs, "ClassifierCompressor", Kept)

    def run(args: Namespace, open_run) -> nn.Module:
        jobs.run_job(args, open_run)
        return made[-1].model

    return run


def reloaded(flags, folder: Path) -> nn.Module:
    file = folder / "quantized_checkpoint.pth.tar"
    return ClassifierCompressor(flags(f"{ARCH} -e --exp-load-weights-from", file)).model


STEPS = {
    "": "8",
    "--qe-equalize": "4",
    "--qe-equalize --qe-equalize-relu6 --qe-absorb-bias --qe-bias-correction": "4",
    "--qe-mixed-precision 5": "8",
    "--qe-mixed-precision-bytes 600": "8",
    "--qe-mixed-precision-bitops 4e6": "8",
    "--qe-clip-search --qe-no-clip-layers fc": "8",
    "--qe-mse-scales": "3",
    "--qe-lapq --lapq-maxfev 8 --lapq-eval-memoize-dataloader": "4",
    "--qe-adaround --qe-adaround-iterations 5 --qe-save-fp-weights": "3",
    "--qe-bias-correction": "3",
    "--qe-lapq --lapq-init-mode L2 --lapq-maxfev 3 --qe-adaround --qe-adaround-iterations 5 --qe-per-channel": "3",
}


@pytest.mark.parametrize("command", STEPS)
def test_what_a_step_made_reloads_to_identical_outputs(flags, open_run, quantized, command):
    model = quantized(flags(f"{QUANTIZE} --qe-mode sym --qe-bits-wts {STEPS[command]} {command}"), open_run)
    again = reloaded(flags, open_run.folder)
    assert torch.equal(model.eval()(IMAGES), again.eval()(IMAGES))
    ours, theirs = canonical_state_dict(model), canonical_state_dict(again)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert "acts_quantization_stats.yaml" in open_run.names()
    is_resumable = any(word in command for word in ("lapq", "adaround", "search", "mixed"))
    assert (RECORD in open_run.names()) == is_resumable


def test_steps_change_what_they_are_to_change_and_a_relu6_keeps_layers_from_being_equalized(
    flags, open_run, quantized, caplog
):
    plain = quantized(flags(f"{QUANTIZE} --qe-bits-wts 4"), open_run)
    outputs = plain.eval()(IMAGES)
    for command in (command for command, bits in STEPS.items() if bits == "4"):
        with caplog.at_level(logging.INFO, logger="distiller"):
            model = quantized(flags(f"{QUANTIZE} --qe-bits-wts 4 {command}"), open_run)
        is_as_before = torch.equal(model.eval()(IMAGES), outputs)
        assert is_as_before == (command == "--qe-equalize"), command
    assert [line for line in caplog.messages if line.startswith("equalized")] == [
        "equalized 0 pairs of layers",
        "equalized 1 pairs of layers",
    ]


def test_equalization_replaces_relu6_and_gives_biases_and_the_checkpoint_says_so(flags, open_run, quantized):
    command = "--qe-equalize --qe-equalize-relu6 --qe-bias-correction"
    model = quantized(flags(f"{QUANTIZE} --qe-bits-wts 4 {command}"), open_run)
    assert model.quantizer_metadata["replaced_relu6s"] == ["relu1"]
    assert model.quantizer_metadata["new_biases"] == ["conv2", "conv3"]
    assert not any(isinstance(module, nn.ReLU6) for module in reloaded(flags, open_run.folder).modules())


def test_the_file_of_parameters_is_that_of_the_model_as_it_is_in_the_end(flags, open_run, quantized):
    model = quantized(flags(f"{QUANTIZE} --qe-bits-wts 3 --qe-mse-scales"), open_run)
    file = yaml.safe_load((open_run.folder / "layer_quant_params.yaml").read_text())["linear_quant_params"]
    scale = 1 / float(model.conv2.weight_scale)  # in Distiller's convention
    assert file["conv2.w_scale"] == pytest.approx(scale, rel=1e-6)


def test_half_precision_needs_no_statistics_and_reloads(flags, open_run, quantized):
    command = f"{ARCH} -e --qe --qe-fpq 16 --qe-no-quant-layers fc"
    model = quantized(flags(command), open_run)
    assert "acts_quantization_stats.yaml" not in open_run.names()
    assert {str(p.dtype) for n, p in model.named_parameters() if "conv" in n} == {"torch.float16"}
    assert model.fc.weight.dtype is torch.float32
    assert torch.equal(model.eval()(IMAGES), reloaded(flags, open_run.folder).eval()(IMAGES))


def test_statistics_of_one_pass(flags, open_run, caplog):
    with caplog.at_level(logging.INFO, logger="distiller"):
        jobs.run_job(flags("--qe-calibration 0.01 --qe-one-pass"), open_run)
    assert "Collecting activation statistics on 12 training images, in one pass" in caplog.messages
    one = yaml.safe_load((open_run.folder / "acts_quantization_stats.yaml").read_text())
    jobs.run_job(flags("--qe-calibration 0.01"), open_run)
    two = yaml.safe_load((open_run.folder / "acts_quantization_stats.yaml").read_text())
    assert one["fc1"]["output"]["max"] == two["fc1"]["output"]["max"]
    assert one["fc1"]["output"]["b"] == pytest.approx(two["fc1"]["output"]["b"], rel=0.01)


def test_searches_measure_the_loss_on_training_images_and_never_on_test_images(flags, open_run, monkeypatch):
    """A defect of Distiller: LAPQ chose scales by the loss on the test set."""
    seen = []

    def spied(model, loader, **keywords):
        seen.append(loader)
        return evaluate(model, loader, **keywords)

    evaluate = quantize_job.evaluate
    monkeypatch.setattr(quantize_job, "evaluate", spied)
    jobs.run_job(flags(f"{QUANTIZE} --qe-lapq --lapq-maxfev 2 --qe-search-size 0.1"), open_run)
    compressor = ClassifierCompressor(flags(ARCH + "-e"))
    of_training = compressor.data.calibration(0.1)
    assert seen
    assert all(torch.equal(loader.indices(), of_training.indices()) for loader in seen)
    assert of_training.num_samples == 129


class _Killed(KeyboardInterrupt):
    pass


@pytest.mark.parametrize(
    "command, done, state",
    [
        ("--qe-adaround --qe-adaround-iterations 5", "AdaRound [2/4]", "adaround.pt"),
        ("--qe-lapq --lapq-maxfev 8", "LAPQ [4/8]", "lapq.jsonl"),
        ("--qe-clip-search", "clip search [2/", "clip_search.jsonl"),
        ("--qe-mixed-precision 5", "mixed precision [3/", "mixed_precision.jsonl"),
    ],
)
def test_an_interrupted_quantization_goes_on_to_the_same_result(
    flags, open_run, quantized, monkeypatch, command, done, state
):
    whole = quantized(flags(f"{QUANTIZE} --qe-bits-wts 4 {command}"), open_run)

    def killing(*args, progress, **keywords):
        def told(line):
            if line.startswith(done):
                raise _Killed
            progress(line)

        return steps_module.quantize_with_data(*args, progress=told, **keywords)

    with monkeypatch.context() as patched:
        patched.setattr(quantize_job, "quantize_with_data", killing)
        with pytest.raises(_Killed):
            jobs.run_job(flags(f"{QUANTIZE} --qe-bits-wts 4 {command}"), open_run)
    killed = open_run.folder
    assert (killed / state).is_file()
    args = flags(f"{QUANTIZE} --qe-bits-wts 4 {command}")
    assert jobs.how_to_go_on(args, killed) == f"--qe-resume {killed}"
    before = (killed / state).read_bytes()

    with pytest.raises(QuantizationError, match="is of another search"):
        quantized(flags(f"{QUANTIZE} --qe-bits-wts 5 {command} --qe-resume", killed), open_run)
    resumed = quantized(flags(f"{QUANTIZE} --qe-bits-wts 4 {command} --qe-resume", killed), open_run)
    assert open_run.folder != killed
    assert (killed / state).read_bytes() == before
    assert (open_run.folder / state).stat().st_size > len(before)
    assert torch.equal(whole.eval()(IMAGES), resumed.eval()(IMAGES))


def test_a_run_without_a_state_is_nothing_to_go_on_with(flags, open_run, tmp_path):
    with pytest.raises(UsageError, match="^--qe-resume .*: nothing to go on with"):
        jobs.run_job(flags(f"{QUANTIZE} --qe-adaround --qe-resume", tmp_path), open_run)
    assert open_run.calls == 0
    assert jobs.how_to_go_on(flags(f"{QUANTIZE} --qe-adaround"), None) is None


CONFIG = """
quantizers:
  ptq: {class: PostTrainLinearQuantizer, bits_activations: 8, bits_parameters: 3}
post_training_steps:
"""


def test_steps_in_a_file_are_those_of_the_flags(flags, open_run, quantized, tmp_path):
    file = tmp_path / "q.yaml"
    file.write_text(CONFIG + "  cross_layer_equalization: true\n  adaround: {iterations: 5}\n")
    of_file = quantized(flags(f"{ARCH} -e --qe --qe-config-file {file}"), open_run)
    of_flags = quantized(
        flags(f"{ARCH} -e --qe --qe-bits-wts 3 --qe-cle --qe-adaround --qe-adaround-iterations 5"), open_run
    )
    assert torch.equal(of_file.eval()(IMAGES), of_flags.eval()(IMAGES))


@pytest.mark.parametrize(
    "line, told",
    [
        ("  adaround: {iterations: 0}", "iterations must be a whole number from 1 on, got 0"),
        ("  adarount: true", "no step 'adarount'; did you mean 'adaround'?"),
        ("  lapq: {metod: Powell}", "no setting 'metod'; did you mean 'method'?"),
    ],
)
def test_a_fault_in_a_step_of_a_file_is_told_with_its_line(flags, open_run, tmp_path, line, told):
    file = tmp_path / "q.yaml"
    file.write_text(f"{CONFIG}{line}\n")
    with pytest.raises(ScheduleError) as error:
        jobs.run_job(flags(f"{ARCH} -e --qe --qe-config-file {file}"), open_run)
    assert str(error.value).startswith(f"{file} has 1 error\n  :5 ")
    assert told in str(error.value)
    assert open_run.calls == 0


@pytest.mark.parametrize(
    "flag, told",
    [
        ("--qe-resume .", "--qe-resume: {} has no step that can be resumed; leave the flag out"),
        ("--qe-search-size 0.1", "--qe-search-size: {} has no search; leave the flag out"),
        (
            "--lapq-eval-memoize-dataloader",
            "--lapq-eval-memoize-dataloader: {} has no search; leave the flag out",
        ),
    ],
)
def test_flags_of_what_a_file_has_not_are_refused(flags, open_run, tmp_path, flag, told):
    file = tmp_path / "q.yaml"
    file.write_text(f"{CONFIG}  bias_correction: true\n")
    with pytest.raises(UsageError) as error:
        jobs.run_job(flags(f"{ARCH} -e --qe --qe-config-file {file} {flag}"), open_run)
    assert str(error.value) == told.format(file)


@pytest.mark.parametrize("steps", ["", "--qe-bias-correction", "--qe-bits-acts 0 --qe-bits-wts 4"])
def test_a_report_on_each_layer(flags, open_run, steps):
    quantize = f"{ARCH} -e --qe" if "acts 0" in steps else QUANTIZE
    jobs.run_job(flags(f"{quantize} {steps} --qe-report"), open_run)
    assert {"quantization_report.csv", "quantization_report.png"} <= open_run.names()
    rows = (open_run.folder / "quantization_report.csv").read_text().splitlines()
    assert any("conv2" in row for row in rows[1:])


def test_a_report_needs_the_model_in_floating_point(flags, open_run):
    jobs.run_job(flags(f"{QUANTIZE}"), open_run)
    file = open_run.folder / "quantized_checkpoint.pth.tar"
    with pytest.raises(UsageError, match="^--qe-report: needs the model in floating point"):
        jobs.run_job(flags(f"{ARCH} -e --qe-report --exp-load-weights-from", file), open_run)


def test_histograms_lie_between_the_ranges_of_a_file_or_of_statistics_collected_before(
    flags, open_run, monkeypatch
):
    drawn = []
    monkeypatch.setattr(
        statistics_job.ActivationHistogramsCollector, "_save_pictures", lambda _, *where: drawn.append(where)
    )
    jobs.run_job(flags(ARCH + "--qe-calibration 0.02"), open_run)
    stats = open_run.folder / "acts_quantization_stats.yaml"
    jobs.run_job(flags(ARCH + "--activation-histograms 0.02 --qe-stats-file", stats), open_run)
    assert open_run.names() == {"acts_histograms.pt"}
    assert drawn == [(open_run.folder / "histogram_imgs", ".svg")]
    of_file = torch.load(open_run.folder / "acts_histograms.pt", weights_only=True)
    jobs.run_job(flags(ARCH + "--act-hist 0.02"), open_run)
    assert "acts_quantization_stats.yaml" in open_run.names()
    alone = torch.load(open_run.folder / "acts_histograms.pt", weights_only=True)
    assert alone.keys() == of_file.keys()
    assert torch.equal(alone["conv2"]["output"]["hist"], of_file["conv2"]["output"]["hist"])


DYNAMIC = "quantizers:\n  ptq: {class: PostTrainLinearQuantizer, bits_activations: 8, bits_parameters: 8}\n"


@pytest.mark.filterwarnings("ignore:not quantized, since without statistics")
def test_a_file_without_statistics_or_steps_takes_the_ranges_of_each_batch_and_says_so(
    flags, open_run, quantized, tmp_path, caplog
):
    file = tmp_path / "q.yaml"
    file.write_text(DYNAMIC)
    model = quantized(flags(f"{ARCH} -e --qe --qe-config-file {file}"), open_run)
    told = [line for line in caplog.messages if "has no model_activation_stats" in line]
    assert told == [
        f"--qe-config-file {file}: has no model_activation_stats: ranges of activations are those of each batch, "
        "as with --qe-dynamic; for fixed ranges collect statistics with --qe-calibration, and give their file "
        "there, as model_activation_stats"
    ]
    assert not any("output_scale" in name for name in model.state_dict())
    assert "acts_quantization_stats.yaml" not in open_run.names()


@pytest.mark.parametrize(
    "flag, told",
    [
        ("--qe-report", "--qe-report: needs fixed ranges, {} takes those of each batch; collect statistics"),
        ("--qe-one-pass", "--qe-one-pass: without effect, with --qe-config-file {} no statistics are coll"),
    ],
)
def test_flags_that_a_file_without_statistics_makes_void_are_refused(flags, open_run, tmp_path, flag, told):
    file = tmp_path / "q.yaml"
    file.write_text(DYNAMIC)
    with pytest.raises(UsageError) as error:
        jobs.run_job(flags(f"{ARCH} -e --qe --qe-config-file {file} {flag}"), open_run)
    assert str(error.value).startswith(told.format(file))
    assert open_run.calls == 0


def test_weights_alone_need_no_ranges_and_nothing_is_told(flags, open_run, tmp_path, caplog):
    file = tmp_path / "q.yaml"
    file.write_text(DYNAMIC.replace("bits_activations: 8", "bits_activations: 0"))
    jobs.run_job(flags(f"{ARCH} -e --qe --qe-config-file {file}"), open_run)
    assert not any("model_activation_stats" in line for line in caplog.messages)


def test_a_file_with_steps_has_statistics_collected_and_says_so(flags, open_run, tmp_path, caplog):
    file = tmp_path / "q.yaml"
    file.write_text(f"{DYNAMIC}post_training_steps: {{bias_correction: true}}\n")
    with caplog.at_level(logging.INFO, logger="distiller"):
        jobs.run_job(flags(f"{ARCH} -e --qe --qe-config-file {file}"), open_run)
    assert any("steps need fixed ranges: calibrating on 5 % of the training" in s for s in caplog.messages)
    assert "acts_quantization_stats.yaml" in open_run.names()


def _never(*_):
    raise AssertionError("statistics were collected before")


@pytest.mark.parametrize("command", ["", "--qe-equalize", "--qe-adaround --qe-adaround-iterations 5"])
def test_a_folder_that_cannot_be_made_is_told_before_statistics(flags, monkeypatch, command):
    def no_run():
        raise UsageError("out-dir: cannot be written")

    monkeypatch.setattr(quantize_job, "collected", _never)
    monkeypatch.setattr(statistics_job, "collected", _never)
    with pytest.raises(UsageError, match="^out-dir"):
        jobs.run_job(flags(f"{QUANTIZE} {command}"), no_run)
    with pytest.raises(UsageError, match="^out-dir"):
        jobs.run_job(flags(ARCH + "--qe-calibration 0.05"), no_run)


def test_what_is_wrong_with_a_folder_to_go_on_from_is_told_before_statistics(
    flags, open_run, monkeypatch, tmp_path
):
    adaround = "--qe-adaround --qe-adaround-iterations 5"
    jobs.run_job(flags(f"{QUANTIZE} {adaround}"), open_run)
    of_before, calls = open_run.folder, open_run.calls
    monkeypatch.setattr(quantize_job, "collected", _never)
    with pytest.raises(UsageError, match="nothing to go on with"):
        jobs.run_job(flags(f"{QUANTIZE} {adaround} --qe-resume", tmp_path), open_run)
    with pytest.raises(QuantizationError, match=r"is of another search, 'quantizer.*' is 8 there, 4 here"):
        jobs.run_job(flags(f"{QUANTIZE} {adaround} --qe-bits-wts 4 --qe-resume", of_before), open_run)
    (of_before / "adaround.pt").write_bytes(b"damaged")
    with pytest.raises(QuantizationError) as error:
        jobs.run_job(flags(f"{QUANTIZE} {adaround} --qe-resume", of_before), open_run)
    assert str(error.value).startswith(f"{of_before / 'adaround.pt'}: is damaged")
    assert open_run.calls == calls


@pytest.mark.parametrize(
    "command", ["--qe-mixed-precision-bytes 9", "--qe-mixed-precision-bytes 9 --qe-equalize"]
)
def test_a_budget_that_cannot_be_reached_is_told_of_its_flag_before_statistics(
    flags, open_run, monkeypatch, command
):
    monkeypatch.setattr(quantize_job, "collected", _never)
    with pytest.raises(QuantizationError) as error:
        jobs.run_job(flags(f"{QUANTIZE} {command}"), open_run)
    assert str(error.value).startswith(
        "--qe-mixed-precision-bytes: 9 cannot be reached, the smallest widths cost "
    )
    assert str(error.value).endswith(" bytes; give at least that")


def test_what_equalization_did_is_told(flags, open_run, caplog):
    with caplog.at_level(logging.INFO, logger="distiller"):
        jobs.run_job(flags(f"{QUANTIZE} --qe-equalize --qe-equalize-relu6 --qe-absorb-bias"), open_run)
    assert "replaced 1 ReLU6s by ReLUs: relu1" in caplog.messages
    assert any(line.startswith("absorbed high biases of ") for line in caplog.messages)
