"""A budget from the command to the saved model, whose answers plain lm-eval finds again."""

from __future__ import annotations

import itertools
import re
import shutil
import statistics
from pathlib import Path

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.benchmarks.conftest import PACKAGE
from tests.conftest import cli, printed, refused, save_llama
from tests.export.conftest import reference_in_process
from tests.helpers.lm_eval import evaluate
from tests.helpers.mixtures import save_mixture
from tests.helpers.package_tasks import plain_package_tasks
from tests.studies.conftest import plain_values, table_column
from tracker import api
from tracker.export.changes import rounding
from tracker.ledger.files import read_note
from tracker.ledger.outcomes import METRIC_PREFIX
from tracker.ledger.store import Ledger, read_records
from tracker.models.rounding import round_weight
from tracker.schema.errors import WorkError
from tracker.schema.findings import FindingRecord
from tracker.schema.weight_formats import FORMATS

WORDS = ("q4_0", "q8_0")
SETTINGS = {"benchmark": "copa", "data": PACKAGE, "sample": 10, "dtype": "float32"}
SETTINGS |= {"seed": 17}  # those that choose are as short as those that test: one check for both
BUDGET = {"budget": "6bpw", "format": ",".join(WORDS), "test_sample": 24}


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    """Write a tiny model within a budget, its results folder, and what was saved."""
    folder = tmp_path_factory.mktemp("quantise")
    model = save_llama(folder / "tiny", layers=2, hidden_size=64, intermediate_size=96)
    outputs = {"results": folder / "results", "output": folder / "saved", "track": []}
    with reference_in_process():
        return model, folder / "results", api.quantise(str(model), **SETTINGS, **BUDGET, **outputs)


def _read_frames(results: Path):
    stores = Ledger(results).cells()
    return {store.identity.benchmark.settings["part"]: store.read() for store in stores}


def _values(table, label, choice=""):
    """Return a column's values by its heading; of a `choice`, the value in its row."""
    values = plain_values(table_column(table, label))
    if not choice:
        return values
    names = plain_values(table_column(table, "chosen by"))
    return next(value for value, name in zip(values, names, strict=True) if choice in name)


def _gold_losses(frame):
    pairs = zip(frame["loglikelihoods"], frame["gold"], strict=True)
    frame["fall"] = [-float(answers[int(gold)]) for answers, gold in pairs]
    means = frame.groupby("ablation")["fall"].mean()
    return means - means["baseline"]


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("tie", ["fused", "none"])
def test_formats_have_the_least_sum_of_losses(tie, quantised, tmp_path):
    """Each choice that was measured gives fused maps one format, unless they are not tied."""
    model, results, done = quantised
    if tie == "none":  # the same measurements of single maps serve both
        results = shutil.copytree(results, tmp_path / "results")
        settings = {**SETTINGS, **BUDGET, "refine": 0, "pairs": 0, "tie": tie}
        done = api.quantise(str(model), **settings, results=results, track=[])
    losses = _gold_losses(_read_frames(results)["calibration"])
    loaded = AutoModelForCausalLM.from_pretrained(model)
    maps = {
        f"{layer}.{path}": module.weight
        for layer in (0, 1)
        for path, module in loaded.model.layers[layer].named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    total = sum(weight.numel() for weight in maps.values())
    bits = {}
    for (name, weight), word in itertools.product(maps.items(), WORDS):
        word_bits = FORMATS[word].bits_per_weight(weight.shape[1])
        bits[name, word] = weight.numel() * word_bits / total
    products = itertools.product(WORDS, repeat=len(maps))
    choices = [dict(zip(maps, forms, strict=True)) for forms in products]
    for layer in "01" if tie == "fused" else "":
        for names in (("q", "k", "v"), ("gate", "up")):
            group = {f"{layer}.{part}.{n}_proj" for part in ("self_attn", "mlp") for n in names}
            choices = [c for c in choices if len({c[n] for n in group & c.keys()}) == 1]
    min_loss = min(
        sum(losses[f"{word}:{name}"] for name, word in choice.items())
        for choice in choices
        if sum(bits[pair] for pair in choice.items()) <= 6
    )
    table = done.finding.tables[0]
    heading = "sum of single losses, calibration"
    assert _values(table, heading, "measured") == pytest.approx(min_loss)
    assert _values(table, "bits a weight", "measured") <= 6
    (note,) = (read_note(path)["formats"] for path in done.files)
    assert note in choices
    if tie == "fused":
        tested = {*_read_frames(results)["test"]["ablation"]} - {"baseline"}
        assert tested <= {str(rounding(choice).ablation) for choice in choices}
        assert len(tested) > 2


def _upper_excess(lost: int, won: int, n: int, budget: float) -> float:
    """Return the upper end of Bonett and Price's interval with one more lost document."""
    values = [1 - budget] * (lost + 2) + [-1 - budget] * (won + 1) + [-budget] * (n - lost - won)
    deviation = statistics.pstdev(values) / len(values) ** 0.5
    return statistics.fmean(values) + statistics.NormalDist().inv_cdf(0.975) * deviation


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("budget", [0.35, 0.01])
def test_the_smallest_choice_within_a_budget_of_accuracy_is_recommended(
    budget, quantised, tmp_path
):
    model, results, _ = quantised
    results = shutil.copytree(results, tmp_path / "results")
    options = {"max_drop": f"{100 * budget:g}pp", "format": ",".join(WORDS), "test_sample": 24}
    done = api.quantise(
        str(model), **SETTINGS, **options, pairs=2, results=results, track=[], keep_accuracy=None
    )
    table = done.finding.tables[0]
    bits, losses = (_values(table, n) for n in ("bits a weight", "loss of gold log-probability"))
    assert bits == sorted(bits, reverse=True)
    assert (len({*bits}), bits[0], bits[-1]) == (len(bits), 8.5, 4.5)
    frame, shown = _read_frames(results)["test"], []
    names = _gold_losses(frame)
    scores = frame.set_index(["ablation", "doc"])[f"{METRIC_PREFIX}acc"]
    for size, loss in zip(bits, losses, strict=True):
        (name,) = names.index[(names - loss).abs() < 1e-9]
        lost, won = (
            (scores["baseline"] > scores[name]).sum(),
            (scores["baseline"] < scores[name]).sum(),
        )
        if _upper_excess(lost, won, 24, budget) > 0:
            break
        shown.append(size)
    names = plain_values(table_column(table, "chosen by"))
    recommended = [b for b, name in zip(bits, names, strict=True) if "recommended" in name]
    assert recommended == shown[-1:]
    assert bool(shown) == bool(done.files) == (budget == 0.35)
    (chart,) = done.finding.charts
    assert list(chart.places) == sorted(_values(table, "model (MB)"))
    assert [line.name for line in chart.lines] == ["test accuracy"]  # of which the band is


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), ("--budget", "--max-drop 2pp")),
        (("--max-drop", "2pp", "--keep-accuracy", "95%"), ("not both",)),
        (("--max-drop", "2"), ("2pp",)),
        (
            ("--max-drop=2pp", "--benchmark", "corpus:{folder}/a.txt", "--metric=loss"),
            ("is not an accuracy",),
        ),
    ],
)
def test_wrong_budgets_of_accuracy_are_refused(options, words, quantised, tmp_path):
    model, _, _ = quantised
    (tmp_path / "a.txt").write_text("Some words.\n\n" * 200)
    command = ["quantise", model, "--sample", "4", "--results", tmp_path / "results"]
    command += ["--benchmark", "copa", "--data", PACKAGE] * ("--benchmark" not in options)
    refused(cli(*command, *(option.format(folder=tmp_path) for option in options)), *words)
    assert not (tmp_path / "results").exists()


def test_a_choice_that_is_not_shown_is_not_saved(quantised, tmp_path):
    model, results, _ = quantised
    results = shutil.copytree(results, tmp_path / "results")
    options = {**SETTINGS, "max_drop": "1pp", "format": ",".join(WORDS), "test_sample": 24}
    with pytest.raises(WorkError, match="no choice is"):
        api.quantise(
            str(model), **options, pairs=2, results=results, track=[], output=tmp_path / "saved"
        )
    assert not (tmp_path / "saved").exists()


@pytest.mark.usefixtures("in_process")
def test_no_share_of_an_accuracy_of_zero_is_kept(quantised, tmp_path):
    """The intact model answers the only test document wrongly."""
    settings = {**SETTINGS, "sample": 2, "seed": 18, "test_sample": 1, "by": "layer", "pairs": 0}
    settings |= {"keep_accuracy": "95%", "format": ",".join(WORDS), "results": tmp_path / "results"}
    done = api.quantise(str(quantised[0]), **settings, track=[])
    assert "accuracy before rounding is 0, so no choice" in done.finding.answers[0]
    assert not done.files


def test_quantise_leaves_no_unfinished_files(quantised):
    """Was: the test half was listed as unfinished for ever, with a command that changed nothing."""
    _, results, _ = quantised
    assert Ledger(results).contents().unfinished == []


def test_lm_eval_agrees_on_the_saved_model(quantised, tmp_path):
    model, results, done = quantised
    saved_model = AutoModelForCausalLM.from_pretrained(done.saved.folder)
    base = AutoModelForCausalLM.from_pretrained(model)
    note = read_note(done.files[0])["formats"]
    assert {f"model.layers.{name}": form for name, form in note.items()} == done.saved.formats
    for name, weight in base.named_parameters():
        form = done.saved.formats.get(name.removesuffix(".weight"))
        expected = weight if form is None else round_weight(weight.data, form)
        assert torch.equal(saved_model.get_parameter(name).data, expected.data)
    table = done.finding.tables[0]
    frame = _read_frames(results)["test"]
    documents = sorted(frame["doc"].unique().tolist())
    assert len(documents) == 24
    tokenizer = AutoTokenizer.from_pretrained(done.saved.folder)
    lm = HFLM(saved_model, tokenizer=tokenizer, batch_size=4)
    name, tasks = "plain_copa", plain_package_tasks(tmp_path)
    evaluation = evaluate(lm, tasks=[name], samples={name: documents}, task_manager=tasks)
    accuracy = evaluation["results"][name]["acc,none"]
    assert _values(table, "accuracy on test documents", "recomm") == pytest.approx(accuracy)
    # Every choice has its own row, with what it answered.
    expected = frame.groupby("ablation")[f"{METRIC_PREFIX}acc"].mean()
    figures = {(round(fall, 4), expected[name]) for name, fall in _gold_losses(frame).items()}
    labels = ("loss of gold log-probability", "accuracy on test documents")
    rows = zip(*(_values(table, label) for label in labels), strict=True)
    shown_figures = {(round(fall, 4), level) for fall, level in rows}
    assert shown_figures == figures - {(0.0, expected["baseline"])}
    assert len({level for _, level in shown_figures}) > 1
    proof = done.saved.proof
    assert (proof.difference, proof.documents, proof.ties) == (0, 24, 0)
    assert proof.figure["acc"] == pytest.approx(accuracy)
    assert (done.saved.folder / "llama.cpp.sh").read_text().startswith("llama-quantize ")
    # The card's size is that of the weights in their formats, all else as it is.
    size = sum(
        weight.numel()
        * (FORMATS[form].bits_per_weight(weight.shape[1]) / 8 if form else weight.itemsize)
        for name, weight in base.named_parameters()
        for form in [done.saved.formats.get(name.removesuffix(".weight"))]
    )
    assert done.saved.after.bytes == size
    card = (done.saved.folder / "README.md").read_text()
    for tool in ("llm-compressor", "mlx-lm", "GPTQModel"):
        assert re.search(rf"No recipe for {tool}: .* q4\\?_0 and q8\\?_0", card)
    assert f"| bytes of weights | {done.saved.before.bytes:,} | {round(size):,} |" in card
    (row,) = done.saved.accuracy
    assert (row.n, row.after.value) == (24, pytest.approx(accuracy))


def test_a_repeated_command_measures_nothing(quantised, tmp_path):
    model, results, done = quantised
    repeated = api.quantise(str(model), **SETTINGS, **BUDGET, results=results, track=[])
    assert repeated.outcome.models_loaded == 0
    assert repeated.finding == done.finding
    command = ("quantise", model, *(f"--{key}={value}" for key, value in SETTINGS.items()))
    command = (*command, "--results", tmp_path / "new", "--track", "none")
    for words, message in (
        (
            ("--budget=2bpw", "--format=q4_0,q8_0"),
            "2bpw is too small. If every linear map has the format q4_0",
        ),
        (("--budget=much",), "invalid budget 'much'; expected e.g. 4.5bpw"),
        (("--budget=5bpw", "--format=q4_0"), "name at least two formats"),
        (("--budget=5bpw", "--format=q4_0,q8"), "there is no format 'q8'"),
        (("--budget=6bpw", "--format=q4_0,int4_g128"), "blocks of 128 weights, but each row"),
        (("--budget=6bpw", "--tie=fuse"), "'fuse' is not one of 'fused', 'none'"),
        (("--budget=6bpw", "--tie=none", "--by=layer"), "--tie none has no effect"),
        (("--budget=5bpw", "--output", model), "is a folder that is not empty"),
    ):
        result = cli(*command, *words)
        assert (result.exit_code, message in result.output) == (2, True), result.output
    assert not (tmp_path / "new").exists()
    # Another budget is another answer about the same file, and stands beside it.
    other_options = {**BUDGET, "budget": "7bpw", "test_sample": 10}
    other_options |= {"results": results, "track": "none", "refine": 0, "pairs": 0}
    options = {**SETTINGS, **other_options}.items()
    words = (f"--{key.replace('_', '-')}={value}" for key, value in options)
    output = printed("quantise", model, *words)
    assert ("swap" in output, "pair" in output) == (False, False)
    assert "format of each map" in output
    findings = read_records(results / "studies", FindingRecord, {})
    commands = {finding.command_line.partition(" --format q4_0,q8_0 ")[0] for finding in findings}
    assert commands == {f"tracker quantise --budget {budget}" for budget in ("6bpw", "7bpw")}


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(("tied", "by"), [(False, "map"), (True, "layer")])
def test_experts_and_embeddings_get_formats(tied, by, tmp_path):
    """A budget of the whole is not one of a mixture's experts, nor of the ends, the largest here.

    Of a mixture whose ends are two matrices, and of a model with one for both.
    """
    model = tmp_path / "tiny"
    if tied:
        shape = {"layers": 2, "hidden_size": 64, "intermediate_size": 96}
        save_llama(model, **shape, tie_word_embeddings=True)
    else:
        save_mixture(model, "olmoe")
    options = {"budget": "6bpw", "format": "q4_0,q8_0", "by": by, "test_sample": 6, "refine": 0}
    options |= {"results": tmp_path / "results", "output": tmp_path / "saved", "track": []}
    settings = {**SETTINGS, "sample": 6}
    results = api.quantise(str(model), **settings, **options, embeddings=True, pairs=0)
    folders = (results.saved.folder, model)
    saved_model, base = map(AutoModelForCausalLM.from_pretrained, folders)
    formats = results.saved.formats
    names = ("gate_up_proj", "down_proj")
    experts = {f"model.layers.{layer}.mlp.experts.{name}" for layer in (0, 1) for name in names}
    assert {"model.embed_tokens", *([] if tied else {"lm_head", *experts})} < {*formats}
    assert (saved_model.lm_head.weight is saved_model.model.embed_tokens.weight) == tied
    bits = total = 0
    for name, weight in base.named_parameters():
        form = formats.get(name.removesuffix(".weight"))
        assert (form is None) == (weight.ndim == 1 or name.endswith("mlp.gate.weight"))
        matrices = weight.data if weight.ndim == 3 else weight.data[None]
        if form is not None:
            matrices = torch.stack([round_weight(matrix, form) for matrix in matrices])
        parameter = saved_model.get_parameter(name).data
        assert torch.equal(parameter, matrices.reshape(weight.shape)), name
        if form is not None:
            bits += weight.numel() * FORMATS[form].bits_per_weight(weight.shape[-1])
            total += weight.numel()
    choices_table, formats_table = results.finding.tables[0], results.finding.tables[-1]
    assert _values(choices_table, "bits a weight", "recomm") == pytest.approx(bits / total)
    assert bits / total <= 6
    columns = (_values(formats_table, heading) for heading in ("weights", "layers"))
    end_names = [name for name, layers in zip(*columns, strict=True) if layers is None]
    assert {*end_names} == {"embedding", *([] if tied else ["lm_head"])}
    command = (results.saved.folder / "llama.cpp.sh").read_text()
    types = [formats[name] for name in ("model.embed_tokens", "lm_head")[: 2 - tied]]
    type_options = f"--token-embedding-type {types[0]} --output-tensor-type {types[-1]} "
    assert type_options in command
    assert tied or all(f"ffn_{name}_exps" in command for name in ("gate", "up", "down"))
    assert " --embeddings " in f"{results.finding.command_line} "
