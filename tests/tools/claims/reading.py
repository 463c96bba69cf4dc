"""Read the texts of results folders, and find the layers and models that they name or rank."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from html.parser import HTMLParser
from itertools import chain, permutations
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

from click.testing import CliRunner

from tracker import api
from tracker.cli import main
from tracker.cli.printing import print_cell, print_results
from tracker.schema.formats import DASH

from .made_up import LAYERS, write_results
from .studied import PAIRS, is_false_statement, study_statements

_UNREAD = {"script", "style", "table", "svg", "template", "button"}
_BLOCKS = {"p", "li", "h1", "h2", "h3", "h4", "figcaption", "small", "summary", "div", "section"}
_NUMBERS = r"\d+(?:–\d+)?"
_NAMED = re.compile(rf"\blayers? ({_NUMBERS}(?:(?:, | and | or ){_NUMBERS})*)")
_SMALL = re.compile(
    r"(?:Without any of )?(\d+) of \d+ layers? "
    r"(?:(?:is|are) shown to cost less than|the right answer is shown to lose less than)"
)
_AMOUNT = re.compile(r" \(−?[\d.]+ pp, [^)]*\)")
_UNLIKE = re.compile(
    rf"highest cosine scores? (?:is|are) .+, not ({_NUMBERS}(?:(?:, | and ){_NUMBERS})*)"
)
_ELSEWHERE = re.compile(r"ranks by relevance and by cosine score differ significantly for (\d+) of")
_RELATED = re.compile(r"\bin ([1-9]\d*) of \d+ measurements?\b.*\(5 %, Holm")
_SHOWN_ROW = re.compile(
    r"(?:^| )(\d+) +(matters|better without|(?:choice )?below 5 pp|(?:less|more) probable) "
)
_NOT_MADE = re.compile(
    "rises without|better without|more probable|to raise (?:accuracy|it)|breaks down"
)
"""What no made-up layer does: it makes no model better, and takes no language from it."""
_BEFORE = re.compile(r"(\S+) before (\S+)")
_ROW = re.compile(r" *(\d+)  +\S")


class _Prose(HTMLParser):
    """Collects the text of a page that is no table: section → a line a block."""

    def __init__(self) -> None:
        super().__init__()
        self.sections = {"": [""]}
        self._unread = 0

    @property
    def _lines(self) -> list[str]:
        return [*self.sections.values()][-1]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._unread += tag in _UNREAD
        if tag == "section":
            self.sections[str(dict(attrs).get("aria-labelledby"))] = [""]
        if tag in _BLOCKS:
            self._lines.append("")

    def handle_endtag(self, tag: str) -> None:
        self._unread -= tag in _UNREAD
        if tag in _BLOCKS:
            self._lines.append("")

    def handle_data(self, data: str) -> None:
        if not self._unread:
            self._lines[-1] += data


def page_prose(page: str) -> dict[str, list[str]]:
    """Read the text of a page that is no table: section → lines."""
    parser = _Prose()
    parser.feed(page)
    return parser.sections


def table_rows(page: str, table: str) -> list[dict[str, str]]:
    """Read a table of a page, if it is there: a row is the beginning of a column's head → text."""
    contents = read_tables(page)
    if table not in contents.tables:
        return []
    names = [re.split(r"[,(]", heading)[0].strip() for heading in contents.headers[table]]
    return [
        dict(zip(names, (text for text, _ in row), strict=True)) for row in contents.tables[table]
    ]


def split_sentences(text: str) -> Iterator[str]:
    """Take a text apart."""
    for line in text.splitlines():
        yield from (
            sentence for sentence in re.split(r"(?<=[.]) ", " ".join(line.split())) if sentence
        )


def named_layers_in(sentence: str) -> set[int]:
    """Find the layers that a sentence names by number."""
    layers: set[int] = set()
    sentence = _AMOUNT.sub("", sentence)
    for numbers in _NAMED.findall(sentence) + _UNLIKE.findall(sentence):
        for number_text in re.findall(_NUMBERS, numbers):
            first_layer, _, last_layer = number_text.partition("–")
            layers |= set(range(int(first_layer), int(last_layer or first_layer) + 1))
    return layers


def ordered_pairs(ranks: Mapping[str, str]) -> Iterator[str]:
    """Yield the pairs that are surely ordered, by ranks such as `1 to 3`."""
    rank_ranges = {
        name: [*map(int, rank.split(" to "))] for name, rank in ranks.items() if rank != DASH
    }
    for better_name, worse_name in permutations(rank_ranges, 2):
        if rank_ranges[better_name][-1] < rank_ranges[worse_name][0]:
            yield f"{better_name} before {worse_name}"


def table_statements(page: str) -> Iterator[str]:
    """Put what the page's tables mark, name and rank in sentences."""
    board = table_rows(page, "model-1-board")
    for row in board:
        if row["shown"] != "open":
            yield f"layer {row['layer']} {row['shown']}"
    yield from ordered_pairs({row["layer"]: row.get("rank", DASH) for row in board})
    for row in table_rows(page, "overview"):
        for layer in re.findall(r"(\d+)\xa0\(", row["layers shown to matter"]):
            yield f"layer {layer} matters on {row['benchmark']}"


def listed_layers(text: str) -> Iterator[str]:
    """Read which layers the tables list that end a run: those that are shown to matter."""
    previous_line = table = ""
    for line in text.splitlines():
        if line.startswith("layer (0-based)"):
            table = previous_line or "mean"
        if row := _ROW.match(line):
            yield f"layer {row[1]} matters: {table}"
        previous_line = line


def board_statements(text: str) -> Iterator[str]:
    """Read what a leaderboard that is printed shows of its layers."""
    for line in text.splitlines():
        if row := _SHOWN_ROW.search(line):
            yield f"layer {row[1]} {row[2]}"


def read_statements(results: Path, rival: Path) -> dict[str, list[str]]:
    """Read all texts about a results folder: kind of text → sentences.

    Under `models` it is what the page says of its model beside the `rival` of another folder, under
    `run`, `evaluate`, `leaderboard` and `ls` what these commands print.
    """
    page = api.report(results=results).files[0].read_text()
    joint_page = api.report(rival, results, output=results / "both.html").files[0].read_text()
    cells = api.ls(results)
    runner = CliRunner()
    printed = [
        runner.invoke(main, [name, "--results", str(results)]) for name in ("leaderboard", "ls")
    ]
    assert not any(result.exit_code for result in printed), [result.output for result in printed]
    evaluate, run = io.StringIO(), io.StringIO()
    with redirect_stdout(evaluate):
        for cell in cells:
            print_cell(cell)
    with redirect_stdout(run):
        print_results(cells)
    across = [line for line in page_prose(joint_page)["across"] if " minus " in line]
    models = ordered_pairs(
        {row["model"]: row.get("rank", DASH) for row in table_rows(joint_page, "model-board")}
    )
    texts = {
        "page": "\n".join(line for lines in page_prose(page).values() for line in lines),
        "tables": "\n".join(table_statements(page)),
        "models": "\n".join([*across, *models]),
        "run": run.getvalue(),
        "evaluate": evaluate.getvalue(),
        "leaderboard": printed[0].output,
        "ls": printed[1].output,
    }
    statements = {text_kind: [*split_sentences(text)] for text_kind, text in texts.items()}
    statements["run"] += listed_layers(run.getvalue())
    statements["leaderboard"] += board_statements(printed[0].output)
    return statements


def check_folders_of(
    folder: Path,
    seeds: Iterable[int],
    costs: Mapping[int, float],
    documents: int,
    studies: bool = False,
    pages: bool = True,
) -> Iterator[tuple[dict[str, list[str]], dict[str, list[str]]]]:
    """Make results folders, and read each with the next: statements, and the false ones.

    `studies` includes those of studies, which take seconds; `pages` those of pages and commands.
    """
    folders, pairs = [folder / str(seed) for seed in seeds], PAIRS if studies else 0
    for results in folders:
        name = f"made-up-{results.name}"
        write_results(results, int(results.name), costs, documents, name, pairs)
    for results, rival in zip(folders, [*folders[1:], folders[0]], strict=True):
        statements = read_statements(results, rival) if pages else {}
        if studies:
            answers = study_statements(results, costs, int(results.name))
            statements |= {"studies": [*chain(*map(split_sentences, answers))]}
        yield (
            statements,
            {
                text_kind: false_statements(text_kind, texts, costs)
                for text_kind, texts in statements.items()
            },
        )


def false_statements(
    text_kind: str, statements: Sequence[str], costs: Mapping[int, float]
) -> list[str]:
    """List the sentences that are not so.

    Of two models, which are alike, nothing is. A layer of no cost is not named, and no layer comes
    before one that costs as much: all that cost take the model down to guessing. No layer helps,
    cosine scores are drawn at random, and of those of other ranks than their cost's there are twice
    as many as layers that cost, at most.
    """
    true_layers = {str(layer) for layer in costs} if text_kind != "models" else set()

    def is_false(sentence: str) -> bool:
        if order_match := _BEFORE.fullmatch(sentence):
            return order_match[1] not in true_layers or order_match[2] in true_layers
        if _RELATED.search(sentence):
            return True
        if text_kind == "studies" and is_false_statement(sentence, costs):
            return True
        if (small_match := _SMALL.match(sentence)) and int(small_match[1]) > LAYERS - len(
            true_layers
        ):
            return True
        if (moved_match := _ELSEWHERE.search(sentence)) and int(moved_match[1]) > 2 * len(
            true_layers
        ):
            return True
        if any(
            _NOT_MADE.search(clause) and named_layers_in(clause) for clause in sentence.split(";")
        ):
            return True
        named_layers = {*map(str, named_layers_in(sentence))}
        is_small = sentence.endswith(" below 5 pp") or "less than 5 pp" in sentence
        return bool(named_layers & true_layers if is_small else named_layers - true_layers)

    return [sentence for sentence in statements if is_false(sentence)]


def read_tables(page: str) -> SimpleNamespace:
    """Find every table by its id: its `headers`, and in `tables` its body as [text, reason]."""
    contents = SimpleNamespace(headers={}, tables={})
    for text in re.findall(r"<table.*?</table>", page, re.DOTALL):
        table = ElementTree.fromstring(text)
        name, (heads, *rows) = table.attrib["id"], table.iter("tr")
        contents.headers[name] = ["".join(head.itertext()).strip() for head in heads]
        contents.tables[name] = [[_read_entry(entry) for entry in row] for row in rows]
    return contents


def _read_entry(entry: ElementTree.Element) -> list[str]:
    abbr = entry.find(".//abbr")
    return ["".join(entry.itertext()).strip(), "" if abbr is None else abbr.attrib["title"]]
