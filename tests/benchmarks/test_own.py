"""Tasks of one's own, and lm-eval's settings: the same questions as plain lm-eval's."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.conftest import ask as asked_for
from tests.benchmarks.conftest import refusal
from tests.conftest import golden
from tests.helpers.lm_eval import RecordingModel, evaluate, folder_tasks, request_tokens, write_rows
from tests.helpers.own_tasks import ASKING_MODULE, PAINT_ROWS, PAINT_TASK, write_tasks
from tracker.benchmarks.benchmark import check_benchmark, data_stamp
from tracker.benchmarks.encoder import RequestEncoder
from tracker.benchmarks.tasks import LmEvalBenchmark
from tracker.ledger.views import request_key
from tracker.measuring.prepare import open_benchmarks
from tracker.schema.config import CellRequest, ModelSpec
from tracker.schema.documents import Document
from tracker.schema.errors import BenchmarkError
from tracker.schema.extent import ALL_DOCUMENTS
from tracker.schema.identities import BenchmarkIdentity


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = write_tasks(tmp_path)
    # As with lm-eval: what a function imports must be importable.
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "words", raising=False)
    return folder


def task_request(benchmark: str, folder: Path | None = None, **settings: Any) -> CellRequest:
    options = {} if folder is None else {"include_path": [str(folder)]}
    return asked_for(benchmark, **options, **settings)


def make(*arguments: Any, **settings: Any) -> LmEvalBenchmark:
    return LmEvalBenchmark(task_request(*arguments, **settings))


def make_documents(parts: tuple[Any, Any], *arguments: Any, **settings: Any) -> list[Document]:
    """Return the documents of a benchmark, with the settings of the request."""
    request = task_request(*arguments, **settings)
    encoder = RequestEncoder(*parts, request.benchmark)
    return LmEvalBenchmark(request).documents(encoder, ALL_DOCUMENTS)


def write_made(folder: Path, parameters: str, things: str) -> None:
    """Write the task `made`, whose function makes a document of each thing."""
    (folder / "made.py").write_text(
        f"import datasets\n\ndef make({parameters}):\n"
        f"    rows = [{{'thing': t, 'colours': ['red', 'blue'], 'right': 0}} for t in {things}]\n"
        "    return {'test': datasets.Dataset.from_list(rows)}\n"
    )
    text = PAINT_TASK.replace("task: paint", "task: made").replace("fewshot_split: train\n", "")
    start, end = text.index("dataset_path"), text.index("test_split")
    text = text[:start] + "custom_dataset: !function made.make\n" + text[end:]
    (folder / "made.yaml").write_text(text)


def without_location(identity: BenchmarkIdentity) -> BenchmarkIdentity:
    """All that an outcome depends on."""
    return identity.model_copy(update={"found_by": {}})


def record_requests(
    model: Any, tokenizer: Any, task: str, folder: Path, **settings: Any
) -> RecordingModel:
    """Record the requests of plain lm-eval, given the same arguments."""
    manager_options = {name: settings.pop(name) for name in ("metadata",) if name in settings}
    names = ("chat_template_args", "enable_thinking", "think_end_token")
    model_options = {name: settings.pop(name) for name in names if name in settings}
    lm = RecordingModel(model, tokenizer, **model_options)
    evaluate(lm, tasks=[task], task_manager=folder_tasks(folder, **manager_options), **settings)
    return lm


class TestTheirTasks:
    def test_its_documents_are_lm_evals(self, folder: Path, loaded: tuple[Any, Any]) -> None:
        documents = make_documents(loaded, "paint", folder)
        assert request_tokens(documents) == record_requests(*loaded, "paint", folder).tokens
        # Its own code leaves the bolt out.
        assert [document.choices for document in documents] == [2, 3, 2]
        text = loaded[1].decode(documents[0].requests[0].context)
        assert "Which colour has a pump? It is" in text
        assert make("paint", folder).identity.tasks[0].documents == 3

    def test_by_its_file(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        by_name = make("paint", folder).identity
        by_file = make(str(folder / "paint.yaml")).identity
        monkeypatch.chdir(folder)
        for identity in (by_file, make("paint.yaml").identity):
            assert without_location(identity) == without_location(by_name)
        assert by_name.name == "paint"
        # But what it takes to find it again.
        assert by_name.found_by == {"include_path": json.dumps([str(folder)])}
        assert by_file.found_by == {"benchmark": str(folder / "paint.yaml")}

    @pytest.mark.parametrize(
        ("file", "change"),
        [
            ("paint.yaml", lambda text: text.replace("Name the", "Say the")),
            ("asking.py", lambda text: text.replace("It is", "It was")),
            ("words.py", lambda text: text.replace("Which", "What")),
        ],
    )
    @pytest.mark.parametrize("task", ["paint", "says"])
    def test_its_fingerprint_covers_what_it_is_made_of(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, file: str, change: Any, task: str
    ) -> None:
        fingerprint = make(task, folder).identity.tasks[0].fingerprint
        assert make(task, folder).identity.tasks[0].fingerprint == fingerprint
        path = folder / file
        path.write_text(change(path.read_text()))
        monkeypatch.delitem(sys.modules, "words")
        assert make(task, folder).identity.tasks[0].fingerprint != fingerprint

    def test_a_change_is_noticed_before_anything_is_loaded(self, folder: Path) -> None:
        def stamp(*arguments: Any) -> str:
            request = task_request(*arguments)
            return request_key(request, "m", data_stamp(request.benchmark), {})

        for arguments in (("paint", folder), (str(folder / "says.yaml"),)):
            old_stamp = stamp(*arguments)
            assert stamp(*arguments) == old_stamp
            for path in (folder / "words.py", folder.parent / "paint.jsonl"):
                path.write_text(path.read_text() + "\n")
                new_stamp = stamp(*arguments)
                assert new_stamp != old_stamp
                old_stamp = new_stamp


class TestRefusals:
    @pytest.mark.parametrize(
        ("benchmark", "include_path", "pattern"),
        [
            ("paint", "nowhere", "include_path: nowhere does not exist"),
            ("paint", "{}/paint.yaml", "is a file; name the folder of the file"),
            ("{}/pain.yaml", None, "there is no task file"),
            ("{}/empty.yaml", None, "does not define a task"),
            ("{}/wrong.yaml", None, r"wrong\.yaml, line 3: not valid YAML"),
        ],
    )
    def test_no_such_folder_or_file(self, folder, benchmark, include_path, pattern) -> None:
        (folder / "empty.yaml").write_text("output_type: multiple_choice\n")
        (folder / "wrong.yaml").write_text("task: wrong\ndoc_to_text: [\n")
        task_folder = None if include_path is None else Path(include_path.format(folder))
        with pytest.raises(BenchmarkError, match=pattern):
            check_benchmark(task_request(benchmark.format(folder), task_folder).benchmark)

    @pytest.mark.parametrize(
        ("code", "pattern"),
        [
            ("import nonsense_of_mine\n", "asking.py, line 1: ModuleNotFoundError"),
            ("def ask(doc:\n", "asking.py, line 1: SyntaxError"),
            (ASKING_MODULE.replace("def ask", "def aks"), "has no function 'ask'"),
            (ASKING_MODULE.replace("['thing']", "['thnig']"), "py, line 4: KeyError: 'thnig'"),
            (ASKING_MODULE.replace("docs.f", "1 / 0 and docs.f"), "line 7: ZeroDivisionError"),
        ],
    )
    def test_code_that_fails(self, folder, loaded, code, pattern) -> None:
        (folder / "asking.py").write_text(code)
        with pytest.raises(BenchmarkError, match=pattern):
            make_documents(loaded, "paint", folder)

    @pytest.mark.parametrize(
        ("result", "pattern"),
        [
            ('{"accuracy": 1.0}', "metric_list contains acc, but process_results returns accuracy"),
            ('{"acc": "yes"}', "process_results returns 'yes' for acc"),
            ('{"acc": 1.0}', None),
        ],
    )
    def test_a_judge_that_lies(self, folder, loaded, result, pattern) -> None:
        (folder / "asking.py").write_text(
            f"{ASKING_MODULE}\ndef judge(doc, results):\n    return {result}\n"
        )
        with (folder / "paint.yaml").open("a") as file:
            file.write("process_results: !function asking.judge\n")
        if pattern is None:
            assert make_documents(loaded, "paint", folder)
            return
        with pytest.raises(BenchmarkError, match=pattern):
            make_documents(loaded, "paint", folder)


class TestFilesBesideTheTask:
    """Was: "cannot be read from the hub", whatever was wrong with a file."""

    @pytest.fixture
    def task_folder(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """Write the folder of the tasks, with the rows in it and named by a relative name."""
        rows = folder.parent / "paint.jsonl"
        task = folder / "paint.yaml"
        task.write_text(task.read_text().replace(str(rows), rows.name))
        rows.rename(folder / rows.name)
        (folder.parent / "elsewhere").mkdir()
        monkeypatch.chdir(folder.parent / "elsewhere")
        return folder

    @pytest.mark.parametrize("name", ["paint.jsonl", "[paint.jsonl]", "pa*.jsonl", "./paint.jsonl"])
    def test_relative_names(self, task_folder: Path, loaded: tuple[Any, Any], name: str) -> None:
        task = task_folder / "paint.yaml"
        task.write_text(task.read_text().replace("paint.jsonl", name))
        for request in (("paint", task_folder), (str(task),), ("both", task_folder)):
            assert make(*request).identity.tasks[0].documents == 3
        texts = [str(d.requests[0].context) for d in make_documents(loaded, str(task))]
        assert len({*texts}) == 3

    def test_the_working_folder_comes_first_as_in_lm_eval(self, task_folder: Path) -> None:
        write_rows(Path(), paint=PAINT_ROWS[:2])
        assert make("paint", task_folder).identity.tasks[0].documents == 2

    def test_a_file_that_does_not_exist_is_named(self, task_folder: Path) -> None:
        (task_folder / "paint.jsonl").rename(task_folder / "pain.jsonl")
        message = refusal(make, "paint", task_folder)
        assert "paint: there is no file paint.jsonl, from which" in message
        assert "Did you mean 'pain.jsonl'?" in message
        assert str(Path.cwd()) in message
        assert "hub" not in message

    @pytest.mark.parametrize(
        ("line", "pattern"), [('{"thing": ', "JSON parse error"), ('{"right": 0}', "'thing'")]
    )
    def test_a_file_that_cannot_be_read_is_named(
        self, task_folder: Path, line: str, pattern: str
    ) -> None:
        (task_folder / "paint.jsonl").write_text(line)
        task = task_folder / "paint.yaml"
        task.write_text(task.read_text().replace("!function asking.ask", '"{{thing.x}}"'))
        text = task.read_text().replace("process_docs: !function asking.prepare\n", "")
        task.write_text(text)
        message = refusal(make, "paint", task_folder)
        assert f"paint cannot read its documents from {task_folder / 'paint.jsonl'}" in message
        assert pattern in message


SYSTEM = "You are a painter."
CHAT = {"apply_chat_template": True}
THINK = {"enable_thinking": True, "think_end_token": "</think>"}


class TestSettings:
    @pytest.mark.parametrize(("task", "arguments", "stored"), golden("settings"))
    def test_the_model_is_asked_what_lm_eval_asks(
        self, folder, loaded, task, arguments, stored
    ) -> None:
        settings = json.loads(arguments)
        model, tokenizer = loaded
        tokenizer.chat_template = (
            "{% if enable_thinking is defined %}[{{ enable_thinking }}]{% endif %}"
            "{% if mood is defined %}({{ mood }}){% endif %}"
            "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}"
        )
        plain = record_requests(model, tokenizer, task, folder, **settings)
        documents = make_documents(loaded, task, folder, **settings)
        if task == "paint":
            assert request_tokens(documents) == plain.tokens
        else:
            prompts = [(document.prompt.text, document.prompt.settings) for document in documents]
            assert prompts == plain.prompts
            end = settings.get("think_end_token")
            assert {document.prompt.think_end_token for document in documents} == {end}
        of_before = {"apply_chat_template", "num_fewshot"} & settings.keys()
        without = make(task, folder, **{name: settings[name] for name in of_before}).identity
        ours = make(task, folder, **settings).identity
        assert bool(ours.settings) is (stored == "in the key")
        assert (ours == without) is not bool(ours.settings)

    def test_what_contradicts_itself(self, folder: Path) -> None:
        for task, settings, message in (
            ("paint", {**CHAT, **THINK}, "scores given answers"),
            ("says", {"enable_thinking": True}, "needs think_end_token"),
            ("says", {"gen_kwargs": {"do_sample": True}}, "without a temperature"),
        ):
            assert message in refusal(make, task, folder, **settings)

    @pytest.mark.parametrize(
        ("template", "pattern"),
        [
            ("{{ raise_exception('No system role!') }}", "refuses a system prompt"),
            ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "shows no"),
        ],
    )
    def test_a_template_that_leaves_the_system_prompt_out(self, folder, loaded, template, pattern):
        loaded[1].chat_template = template
        with pytest.raises(BenchmarkError, match=pattern):
            make_documents(loaded, "paint", folder, system_instruction=SYSTEM, **CHAT)

    @pytest.mark.parametrize(
        ("template", "error"),
        [
            (
                "{{ raise_exception('Roles must alternate') }}",
                "TemplateError: Roles must alternate",
            ),
            ("{{ messages[0].parts.text }}", "UndefinedError: "),
            ("{% for m in messages %}", "TemplateSyntaxError: "),
            ("{{ messages[0].content + 1 }}", "TypeError: "),
        ],
    )
    def test_a_template_that_fails(self, folder, loaded, template, error) -> None:
        """Was: the task's data was said to lack columns."""
        loaded[1].chat_template = template
        with pytest.raises(BenchmarkError) as caught:
            make_documents(loaded, "paint", folder, **CHAT)
        message = str(caught.value)
        assert f"apply_chat_template: the model's chat template fails ({error}" in message
        assert "columns" not in message

    def test_a_template_by_its_name(self, folder: Path, loaded: tuple[Any, Any]) -> None:
        """lm-eval writes down the named one and applies the default: both must be the same."""
        model, tokenizer = loaded
        other = "{% for m in messages %}{{ m.content }}{% endfor %}"
        tokenizer.chat_template = {"default": tokenizer.chat_template, "bare": other}

        def documents(name: Any) -> list[Document]:
            identity = make("paint", folder, apply_chat_template=name).identity
            assert identity.apply_chat_template is True
            return make_documents(loaded, "paint", folder, apply_chat_template=name)

        assert documents("default") == documents(True)
        for name in ("default", "bare"):
            plain = record_requests(model, tokenizer, "paint", folder, apply_chat_template=name)
            assert plain.tokens == request_tokens(documents(True))
        with pytest.raises(BenchmarkError, match="'bare' is not the default"):
            documents("bare")
        with pytest.raises(BenchmarkError, match="'bear' is not available"):
            documents("bear")

    def test_documents_are_made_for_each_model(self, folder: Path) -> None:
        """Was: a second model was measured on the documents that a task made for the first one."""
        write_made(folder, "pretrained='', **settings", "[pretrained]")
        models = ("first", "second", "first")
        requests = [
            replace(task_request(task, folder), model=ModelSpec(model=name))
            for name in models
            for task in ("made", "paint")
        ]
        benchmarks = [*open_benchmarks(requests)]
        assert len({id(benchmark) for benchmark in benchmarks}) == 3
        fingerprints = [benchmark.identity.tasks[0].fingerprint for benchmark in benchmarks[::2]]
        assert fingerprints[0] == fingerprints[2] != fingerprints[1]

    def test_a_task_that_makes_its_documents(self, folder: Path, loaded: tuple[Any, Any]) -> None:
        write_made(folder, "things=(), **settings", "things")
        metadata = {"things": ["door", "roof"]}
        ours = make("made", folder, metadata=metadata)
        plain = record_requests(*loaded, "made", folder, metadata=metadata)
        tokens = request_tokens(make_documents(loaded, "made", folder, metadata=metadata))
        assert tokens == plain.tokens
        assert len(tokens) == 4
        other = make("made", folder, metadata={"things": ["door"]}).identity
        assert other.tasks[0].fingerprint != ours.identity.tasks[0].fingerprint
        # What changes no document changes nothing.
        noted_identity = make("made", folder, metadata={**metadata, "note": "today"}).identity
        assert without_location(noted_identity) == without_location(ours.identity)


MAX = '{"do_sample": false, "max_gen_toks": 4, "until": ["."]}'


@pytest.mark.parametrize(
    ("typed", "stored"),
    [
        ({"until": ["."], "max_gen_toks": 4, "do_sample": False}, MAX),
        ('{"until": ["."], "max_gen_toks": 4, "do_sample": false}', MAX),
        ("{'until': ['.'], 'max_gen_toks': 4, 'do_sample': False}", MAX),
        # lm-eval's own form.
        (
            "max_gen_toks=4,temperature=0.0,top=True,x=y",
            '{"max_gen_toks": 4, "temperature": 0.0, "top": true, "x": "y"}',
        ),
    ],
)
def test_settings_are_the_same_however_they_are_typed(typed: Any, stored: str) -> None:
    assert task_request("b", gen_kwargs=typed).benchmark.gen_kwargs == stored


def test_settings_that_are_not_used_leave_the_keys_of_before() -> None:
    # Printed by request_key before these settings existed.
    before = "06e4a17a7c9d8537fd1879af32e2efd73f4e6b92aca72dccf4c5d9285c841072"
    assert request_key(task_request("b"), "stamp", None, {}) == before
