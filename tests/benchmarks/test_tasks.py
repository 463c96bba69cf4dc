"""lm-eval's tasks on the package's data, compared with the data itself and with plain lm-eval."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from lm_eval.api.instance import Instance

from tests.benchmarks.conftest import PACKAGE, make, piqa, refusal
from tests.helpers.lm_eval import (
    TASKS,
    RecordingModel,
    evaluate,
    folder_tasks,
    load_model_parts,
    request_tokens,
    write_rows,
)
from tests.helpers.package_tasks import load_rows, package_benchmark, plain_package_tasks
from tracker.benchmarks import factory
from tracker.benchmarks.benchmark import choose_metric
from tracker.benchmarks.encoder import RequestEncoder
from tracker.benchmarks.factory import find_task
from tracker.benchmarks.fingerprint import list_rows
from tracker.benchmarks.sources import open_data_source
from tracker.benchmarks.tasks import aggregate
from tracker.schema.config import BenchmarkSpec
from tracker.schema.documents import Document, Response
from tracker.schema.errors import BenchmarkError
from tracker.schema.extent import ALL_DOCUMENTS, Extent

PIQA = piqa("pump", 12)
OPTIONS = {"question": "q", "options": ["a", "b"], "answer": "A", "answer_index": 0}
SUMS = [{"question": "1 + 1?", "answer": "It is 2. #### 2"}] * 2


@pytest.fixture
def data(tmp_path) -> Path:
    return tmp_path / "DATA"


def decode_request(encoder: RequestEncoder, document: Document, request: int = 0) -> str:
    tokens = document.requests[request]
    return encoder.tokenizer.decode([*tokens.context, *tokens.continuation])


def test_requests_are_made_without_a_bar(encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Was: planning mmlu printed 57 of them where the hub may be asked."""
    bars = []
    monkeypatch.setattr(
        "lm_eval.api.task.tqdm", lambda documents, **_: bars.append(documents) or documents
    )
    assert len(package_benchmark("copa").documents(encoder, Extent(limit=2))) == 2
    assert not bars


def test_an_unknown_one_names_the_nearest() -> None:
    with pytest.raises(BenchmarkError, match=r"no task or group 'hellaswg'.*lm-eval ls") as caught:
        find_task(BenchmarkSpec(benchmark="hellaswg"))
    assert "Did you mean 'hellaswag'?" in str(caught.value)
    assert "arc_easyy" in refusal(make, "arc_easyy")
    with pytest.raises(BenchmarkError, match="'qqqqqqqqqqqqqqqq'") as other_caught:
        find_task(BenchmarkSpec(benchmark="qqqqqqqqqqqqqqqq"))
    assert "Did you mean" not in str(other_caught.value)


class TestIdentity:
    @pytest.mark.parametrize(
        ("name", "documents", "primary", "metrics"),
        [
            ("hellaswag", 10042, "acc_norm", ["acc", "acc_norm"]),
            ("arc_challenge", 299, "acc_norm", ["acc", "acc_norm"]),
            ("openbookqa", 500, "acc_norm", ["acc", "acc_norm"]),
            ("arc_easy", 570, "acc", ["acc", "acc_norm"]),
            ("piqa", 1838, "acc", ["acc", "acc_norm"]),
            ("winogrande", 1267, "acc", ["acc"]),
            ("boolq", 3270, "acc", ["acc"]),
            ("copa", 100, "acc", ["acc"]),
        ],
    )
    def test_of_a_task(self, name: str, documents: int, primary: str, metrics: list[str]) -> None:
        identity = package_benchmark(name).identity
        (task,) = identity.tasks
        assert (identity.name, task.name) == (name, name)
        assert (task.split, task.documents) == ("validation", documents)
        assert task.metrics == dict.fromkeys(metrics, "mean")
        assert identity.primary_metric == primary
        assert (identity.num_fewshot, identity.seed) == (0, None)
        assert identity.data == PACKAGE
        assert len(task.fingerprint) == 64

    def test_of_a_group_and_a_tag(self) -> None:
        identity = package_benchmark("mmlu_stem").identity
        sizes = {task.name: task.documents for task in identity.tasks}
        assert len(sizes) == 19
        for name, documents in sizes.items():
            assert documents == len(load_rows("cais/mmlu", name.removeprefix("mmlu_"), "test"))
        assert (identity.weight_by_size, identity.primary_metric) == (True, "acc")
        tag = package_benchmark("ai2_arc").identity
        assert {task.name for task in tag.tasks} == {"arc_easy", "arc_challenge"}

    def test_a_metric_that_is_no_mean_keeps_its_name(self) -> None:
        (task,) = package_benchmark("cb").identity.tasks
        assert task.metrics == {"acc": "mean", "f1": "cb_multi_fi"}


class TestFingerprint:
    def fingerprint(self, *arguments: Any, **settings: Any) -> str:
        (task,) = make(*arguments, **settings).identity.tasks
        return task.fingerprint

    def test_rows_are_those_that_a_data_set_gives(self) -> None:
        rows = [{"q": "a", "choices": {"text": ["x", "y"]}, "more": [{"n": 1}, {"n": 2}]}]
        data = Dataset.from_list(rows)
        transformed = data.with_transform(lambda batch: {"q": [*map(str.upper, batch["q"])]})
        assert list_rows(data) == [*data] == rows
        assert list_rows(transformed) == [*transformed] == [{"q": "A"}]

    def test_the_place_does_not_count(self, data) -> None:
        (original,) = package_benchmark("piqa").identity.tasks
        shutil.copytree(open_data_source(PACKAGE).root / "piqa/plain_text", data / "baber/piqa")
        assert self.fingerprint("piqa", data) == original.fingerprint
        write_rows(data / "again/baber/piqa", validation=load_rows("baber/piqa", None))
        assert self.fingerprint("piqa", data / "again") == original.fingerprint

    @pytest.mark.parametrize(
        "changed", [[*PIQA[:11], {**PIQA[11], "sol2": "use glue"}], PIQA[:11], PIQA[::-1]]
    )
    def test_the_documents_count(self, data, changed: list[Any]) -> None:
        write_rows(data / "a/baber/piqa", validation=PIQA)
        write_rows(data / "b/baber/piqa", validation=changed)
        assert self.fingerprint("piqa", data / "a") != self.fingerprint("piqa", data / "b")

    def test_the_few_shot_pool_counts_where_it_is_used(self, data) -> None:
        write_rows(data / "a/baber/piqa", validation=PIQA, train=PIQA[:6])
        write_rows(data / "b/baber/piqa", validation=PIQA, train=PIQA[6:])
        for shots in (0, 2):
            first, second = (
                self.fingerprint("piqa", data / letter, num_fewshot=shots) for letter in "ab"
            )
            assert (first == second) == (shots == 0)

    # Was: the names of unused splits are part of the configuration that
    # is hashed, so the hub (which has a train split) and the package (which has none) give two
    # cells for the same 0-shot documents.
    def test_a_split_that_is_not_used_does_not_count(self, data) -> None:
        write_rows(data / "a/baber/piqa", validation=PIQA)
        write_rows(data / "b/baber/piqa", validation=PIQA, train=PIQA)
        assert self.fingerprint("piqa", data / "a") == self.fingerprint("piqa", data / "b")

    # Was: functions of a task (process_docs of hellaswag, doc_to_text of
    # copa and winogrande) is hashed by its repr, which holds its address: every process makes a
    # cell of its own, so nothing is continued and nothing is shared.
    def test_another_process_finds_the_same(self) -> None:
        names = ("winogrande", "copa", "cb")
        code = (
            "from tests.benchmarks.conftest import make\n"
            f"for name in {names}:\n    print(make(name).identity.tasks[0].fingerprint)"
        )
        root = Path(__file__).parents[2]
        output = subprocess.check_output([sys.executable, "-c", code], cwd=root, text=True)
        identities = [package_benchmark(name).identity for name in names]
        assert output.split() == [identity.tasks[0].fingerprint for identity in identities]


class TestRefusals:
    def test_few_shot_without_a_pool(self) -> None:
        message = refusal(make, "piqa", num_fewshot=5)
        assert "piqa draws few-shot examples from the split 'train'" in message
        assert "num_fewshot 0" in message

    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            ({}, "greedy"),
            ({"do_sample": False}, "greedy"),
            ({"do_sample": False, "temperature": 0.7}, "greedy"),
            ({"temperature": 0.0}, "greedy"),
            ({"temperature": "0.0", "num_beams": 1}, "greedy"),
            ({"temperature": 0.7}, "sampled"),
            # lm-eval takes null as not said.
            ({"do_sample": None, "temperature": 0.7}, "sampled"),
            ({"do_sample": True}, "samples its texts without a temperature"),
            ({"do_sample": False, "num_beams": 4}, "uses beam search"),
        ],
    )
    def test_texts_that_are_not_greedy(
        self, data, tmp_path, monkeypatch, settings, expected
    ) -> None:
        write_rows(data / "openai/gsm8k/main", train=SUMS, test=SUMS)
        content = {"include": str(TASKS / "gsm8k/gsm8k.yaml"), "task": "own"}
        (tmp_path / "own.yaml").write_text(json.dumps({**content, "generation_kwargs": settings}))
        index = folder_tasks(tmp_path).task_index
        monkeypatch.setattr(factory, "list_tasks", lambda: index)
        if expected in ("greedy", "sampled"):
            settings = make("own", data).identity.settings
            assert ("noise" in settings) == (expected == "sampled")
        else:
            assert expected in refusal(make, "own", data)

    def test_a_split_that_is_not_there(self, data) -> None:
        """A folder's validation split does not stand in for the test split, as a package's does."""
        shutil.copytree(open_data_source(PACKAGE).root / "ai2_arc", data / "allenai/ai2_arc")
        message = refusal(make, "arc_easy", data)
        assert "scored on the split 'test'" in message
        assert "has only the splits validation" in message

    # Was: without its label column piqa is scored, and every document is wrong: lm-eval
    # takes the name of a missing column for the answer itself ("label" is no choice).
    @pytest.mark.parametrize("column", ["goal", "sol2", "label"])
    def test_a_column_that_is_not_there(self, data, column: str) -> None:
        documents = [{k: v for k, v in document.items() if k != column} for document in PIQA]
        write_rows(data / "baber/piqa", validation=documents)
        message = refusal(make, "piqa", data)
        assert f"piqa cannot read its documents from {data}" in message
        assert "columns" in message

    # Was: the task's own count wins over the one that was asked for, though
    # _configure lets num_fewshot 0 win; the message then advises what was already done.
    def test_zero_shot_needs_no_pool(self, data) -> None:
        write_rows(data / "TIGER-Lab/MMLU-Pro", test=[OPTIONS] * 2)
        assert "few-shot" in refusal(make, "leaderboard_mmlu_pro", data)
        assert make("leaderboard_mmlu_pro", data, num_fewshot=0).identity.num_fewshot == 0

    # Was: examples that stand in the task's own YAML
    # (fewshot_config.samples) need no split.
    def test_examples_in_the_task_itself_need_no_pool(self, data) -> None:
        documents = [{"input": "not ( True ) is", "target": "False"}] * 2
        write_rows(data / "SaylorTwift/bbh/boolean_expressions", test=documents)
        made = make("leaderboard_bbh_boolean_expressions", data)
        assert made.identity.num_fewshot == 3


class TestMetrics:
    @pytest.mark.parametrize(
        ("task", "metric", "text"),
        [
            (
                "arc_easy",
                "acc_nrom",
                "arc_easy has no metric 'acc_nrom'. Did you mean 'acc_norm'? It has: acc, acc_no",
            ),
            # It has no value a document.
            (
                "cb",
                "f1",
                "over all documents at once (cb_multi_fi), so no drop per document exists",
            ),
            ("cb", "f1", "choose acc"),
        ],
    )
    def test_one_that_cannot_be(self, task: str, metric: str, text: str) -> None:
        with pytest.raises(BenchmarkError, match=re.escape(text)):
            choose_metric(package_benchmark(task).identity, metric)

    def test_aggregation_is_lm_evals(self) -> None:
        assert aggregate("mean", [1.0, 0.0, 0.0, 1.0]) == 0.5
        assert aggregate("perplexity", [-1.0, -3.0]) == pytest.approx(math.exp(2))
        # 1 of 2 positives found, none wrongly: precision 1, recall 1/2.
        pairs = [json.dumps(pair) for pair in ([1, 1], [1, 0], [0, 0])]
        assert aggregate("f1", pairs) == pytest.approx(2 / 3)
        assert aggregate("cb_multi_fi", pairs) is None


class TestDocuments:
    def test_a_limit_is_a_prefix_with_fixed_examples(self, encoder) -> None:
        benchmark = package_benchmark("mmlu_anatomy", 5)
        documents = benchmark.documents(encoder, Extent(limit=10))
        assert len(documents) == 10
        assert [document.index for document in documents] == list(range(10))
        assert benchmark.documents(encoder, Extent(limit=3)) == documents[:3]
        assert benchmark.documents(encoder, Extent(limit=10)) == documents
        new = make("mmlu_anatomy", num_fewshot=5)
        assert new.documents(encoder, Extent(limit=4)) == documents[:4]
        examples = load_rows("cais/mmlu", "anatomy", "dev")
        text = decode_request(encoder, documents[7])
        positions = [text.index(question) for question in examples["question"]]
        assert positions == sorted(positions)
        assert positions[-1] < text.index(load_rows("cais/mmlu", "anatomy", "test")[7]["question"])

    def test_drawn_examples_are_those_of_a_whole_run(self, data, encoder) -> None:
        """The random generator moves on with every document; lm-eval's `samples` changes them."""
        write_rows(data / "baber/piqa", validation=PIQA, train=[{**d, "label": 0} for d in PIQA])
        benchmark = make("piqa", data, num_fewshot=2)
        documents = benchmark.documents(encoder, ALL_DOCUMENTS)
        assert len(documents) == 12
        for limit in (1, 5, 11):
            assert benchmark.documents(encoder, Extent(limit=limit)) == documents[:limit]
            sample = benchmark.documents(encoder, Extent(sample=limit))
            assert sample == [documents[document.index] for document in sample]
            assert len(sample) == limit
        examples = {decode_request(encoder, d).rsplit("Question:", 1)[0] for d in documents}
        assert len(examples) > 6
        other_benchmark = make("piqa", data, num_fewshot=2, seed=7)
        assert other_benchmark.identity.seed == 7
        assert other_benchmark.documents(encoder, ALL_DOCUMENTS) != documents

    def test_gold_and_choices_are_those_of_the_data(self, encoder) -> None:
        arc = load_rows("allenai/ai2_arc", "ARC-Challenge")
        documents = package_benchmark("arc_challenge").documents(encoder, ALL_DOCUMENTS)
        assert len(documents) == len(arc) == 299
        for document, row in zip(documents, arc, strict=True):
            labels = row["choices"]["label"]
            assert labels[document.gold] == row["answerKey"]
            assert document.choices == len(document.requests) == len(labels)
            request = document.requests[document.gold]
            text = encoder.tokenizer.decode(list(request.continuation))
            assert text == " " + row["choices"]["text"][document.gold]
        assert len({document.gold for document in documents}) >= 4

    @pytest.mark.parametrize(
        ("benchmark", "path", "name", "gold"),
        [
            ("piqa", "baber/piqa", None, lambda row: row["label"]),
            ("hellaswag", "Rowan/hellaswag", None, lambda row: int(row["label"])),
            ("winogrande", "allenai/winogrande", "winogrande_xl", lambda r: int(r["answer"]) - 1),
            ("boolq", "aps/super_glue", "boolq", lambda row: int(row["answer"])),
            ("copa", "aps/super_glue", "copa", lambda row: row["label"]),
            ("sciq", "allenai/sciq", None, lambda row: 3),
            ("social_iqa", "lighteval/siqa", None, lambda row: int(row["label"]) - 1),
        ],
    )
    def test_gold_of_other_kinds_of_tasks(self, encoder, benchmark, path, name, gold) -> None:
        documents = package_benchmark(benchmark).documents(encoder, Extent(limit=20))
        assert [document.gold for document in documents] == [
            gold(row) for row in load_rows(path, name).select(range(20))
        ]

    def test_an_answer_that_is_no_choice_has_no_gold(self, data, encoder) -> None:
        """As in the test splits of the hub whose labels are hidden."""
        write_rows(data / "baber/piqa", validation=[{**document, "label": -1} for document in PIQA])
        documents = make("piqa", data).documents(encoder, ALL_DOCUMENTS)
        assert {document.gold for document in documents} == {None}
        assert {document.choices for document in documents} == {2}

    def test_a_task_without_choices(self, data, encoder) -> None:
        texts = ["the cat sat on the mat", "a dog ran home"]
        write_rows(
            data / "EleutherAI/lambada_openai/default", test=[{"text": text} for text in texts]
        )
        benchmark = make("lambada_openai", data)
        assert benchmark.identity.primary_metric == "acc"
        documents = benchmark.documents(encoder, ALL_DOCUMENTS)
        assert [(d.gold, d.choices, len(d.requests)) for d in documents] == [(0, 0, 1)] * 2
        assert [decode_request(encoder, document) for document in documents] == texts
        metrics = benchmark.outcomes(documents[1], [Response(-2.5, True, 0)])
        assert metrics == {"acc": 1.0, "perplexity": -2.5}
        with pytest.raises(BenchmarkError, match="perplexity"):
            choose_metric(benchmark.identity, "perplexity")


class TestOutcomes:
    def test_one_judgement_does_not_colour_the_next(self, encoder) -> None:
        benchmark = package_benchmark("piqa")
        first, second = benchmark.documents(encoder, Extent(limit=2))
        for document, choice, acc in (
            (first, first.gold, 1.0),
            (first, 1 - first.gold, 0.0),
            (first, first.gold, 1.0),
            (second, second.gold, 1.0),
            (first, 1 - first.gold, 0.0),
        ):
            responses = [Response(-1.0 if i == choice else -5.0, False, 0) for i in range(2)]
            assert benchmark.outcomes(document, responses)["acc"] == acc

    @pytest.mark.parametrize("value", [math.nan, -math.inf, math.inf])
    @pytest.mark.parametrize("position", [0, 1])
    def test_a_score_that_is_not_finite_has_no_outcome(self, encoder, value, position) -> None:
        benchmark = package_benchmark("piqa")
        (document,) = benchmark.documents(encoder, Extent(limit=1))
        responses = [Response(-1.0, False, 0), Response(-2.0, False, 0)]
        responses[position] = Response(value, False, 0)
        assert benchmark.outcomes(document, responses) == {"acc": None, "acc_norm": None}


@pytest.fixture(scope="module")
def plain_tasks(tmp_path_factory) -> Any:
    return plain_package_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.mark.parametrize(
    ("benchmark", "shots", "chat", "bos"),
    [
        ("arc_easy", 0, False, False),
        ("arc_easy", 0, False, True),
        ("arc_easy", 0, True, False),
        ("piqa", 0, False, True),
        ("hellaswag", 0, False, False),
        ("winogrande", 0, False, True),
        ("mmlu_anatomy", 5, False, False),
        ("mmlu_anatomy", 5, True, True),
    ],
)
def test_the_model_is_asked_what_lm_eval_asks(tiny_llama, plain_tasks, benchmark, shots, chat, bos):
    model, tokenizer = load_model_parts(tiny_llama(bos=bos))
    lm = RecordingModel(model, tokenizer)
    evaluate(
        lm,
        tasks=[f"plain_{benchmark}"],
        num_fewshot=shots,
        limit=6,
        apply_chat_template=chat,
        task_manager=plain_tasks,
    )
    ours = make(benchmark, num_fewshot=shots, apply_chat_template=chat)
    assert ours.identity.apply_chat_template is chat
    tokens = request_tokens(ours.documents(RequestEncoder(model, tokenizer), Extent(limit=6)))
    assert tokens == lm.tokens
    assert len(tokens) >= 12
    assert {context[0] == tokenizer.bos_token_id for context, _ in tokens} == {bos}


class TestSamples:
    @pytest.mark.parametrize(("benchmark", "shots"), [("arc_easy", 0), ("mmlu_anatomy", 5)])
    def test_it_is_lm_evals_own(self, loaded, plain_tasks, benchmark: str, shots: int) -> None:
        model, tokenizer = loaded
        ours = make(benchmark, num_fewshot=shots)
        documents = ours.documents(RequestEncoder(model, tokenizer), Extent(sample=6))
        numbers = [document.index for document in documents]
        assert numbers == sorted(numbers) != list(range(6))
        lm, task = RecordingModel(model, tokenizer), f"plain_{benchmark}"
        settings = {"num_fewshot": shots, "task_manager": plain_tasks}
        evaluate(lm, tasks=[task], samples={task: numbers}, **settings)
        assert request_tokens(documents) == lm.tokens


def test_an_empty_context_is_lm_evals(loaded) -> None:
    """lm-eval puts the beginning-of-text token where there is no context."""
    model, tokenizer = loaded
    instances = [
        Instance("loglikelihood", {}, arguments, index)
        for index, arguments in enumerate([("", "Paris"), ("The capital ", "of"), ("A", " heart")])
    ]
    lm = RecordingModel(model, tokenizer)
    lm.loglikelihood(instances, disable_tqdm=True)
    requests = RequestEncoder(model, tokenizer).encode(instances)
    assert [(request.context, request.continuation) for request in requests] == lm.tokens
    assert requests[0].context == (tokenizer.bos_token_id,)
    # A trailing space moves into the continuation.
    assert tokenizer.decode(list(requests[1].continuation)) == " of"
