"""Check that the survey of families finds wrong numbers, and how verdicts are kept."""

from __future__ import annotations

import re
from collections import Counter
from contextlib import suppress

import pytest
import torch

from tests.helpers.registry import families, make_registered
from tests.tools import census, survey
from tests.tools.census import find_remaining, page, read_verdicts, write_verdicts
from tests.tools.survey import (
    CRASH,
    DELETED,
    DISCONTINUOUS,
    EXACT,
    NO_VARIANT,
    REFUSED,
    PlainTruth,
    Verdict,
    examine_variant,
    make_blocks,
)
from tests.tools.variants import find_variant, variants
from tracker.models.parts.anatomy import LayerAnatomy
from tracker.models.parts.experts import Experts
from tracker.models.parts.heads import Heads, _replaced_attention
from tracker.models.sources import parts_of_config
from tracker.schema.changes import INTACT, Ablation
from tracker.schema.errors import ModelError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def few(monkeypatch):
    """Ablate a layer alone, and two together, in place of every layer."""
    monkeypatch.setattr(
        survey, "ABLATIONS", [INTACT, Ablation.parse("layer:0"), Ablation.parse("layers:1,2")]
    )


@pytest.mark.parametrize(
    ("family", "name"),
    [
        # Positions by the kind of layer; layers that are not one list.
        ("gemma3_text", "rope longrope"),
        ("hrm_text", "plain"),
        ("blt", "plain"),
    ],
)
def test_a_variant_is_exact_or_said_not_to_be(family, name, few):
    """`make families` measures all of them, which takes hours."""
    verdict = examine_variant(find_variant(family, name))
    assert verdict.verdict in (EXACT, REFUSED, DISCONTINUOUS), verdict
    assert verdict.verdict == REFUSED or not verdict.idle, verdict


def test_a_wrong_number_is_found(monkeypatch, few):
    """A survey that cannot fail would be worth nothing."""
    true_check = survey.check_sharing

    def wrong_check(engine, *args):
        with torch.no_grad():
            engine.loaded.layers[2].self_attn.o_proj.weight.mul_(1.01)
        return true_check(engine, *args)

    monkeypatch.setattr(survey, "check_sharing", wrong_check)
    monkeypatch.setattr(survey, "ROWS", (192, 192))  # of one length: one verdict
    verdict = examine_variant(find_variant("llama", "plain"))
    assert verdict.verdict == survey.WRONG
    assert "baseline by" in verdict.why


def test_a_foreign_exception_is_a_crash(monkeypatch):
    def fails(*args):
        raise ZeroDivisionError("somewhere")

    monkeypatch.setattr(survey, "check_sharing", fails)
    verdict = examine_variant(find_variant("llama", "plain"))
    assert (verdict.verdict, verdict.why) == (CRASH, "ZeroDivisionError: somewhere")


def test_what_takes_too_long_is_stopped(monkeypatch):
    def hangs(*args):
        while True:
            pass

    monkeypatch.setattr(survey, "SECONDS", 1)
    monkeypatch.setattr(survey, "check_sharing", hangs)
    verdict = examine_variant(find_variant("llama", "plain"))
    assert verdict.verdict == CRASH
    assert verdict.why.endswith("longer than 1 s")


def test_both_truths_agree_where_layers_know_no_numbers():
    """The layer that hands its input on, and the layer that is deleted."""
    request = make_blocks()[1][0].requests[2]
    for family in ("llama", "gemma2", "granite_swa"):
        truth = PlainTruth(make_registered(family))
        for ablation in (Ablation.parse("layer:0"), Ablation.parse("layers:1,2")):
            expected = truth.loglikelihood(ablation, request)
            assert truth.loglikelihood(ablation, request, DELETED) == pytest.approx(
                expected, abs=1e-4
            )
            assert abs(truth.loglikelihood(INTACT, request) - expected) > 0.02


def test_the_page_merges_variants():
    llama = [variant for variant in variants("llama") if variant.name in ("plain", "eager")]
    text = page(
        [
            Verdict(llama[0], EXACT, "documents", 2e-5),
            Verdict(llama[1], EXACT, "depth", 3e-5),
            Verdict(find_variant("hrm_text", "plain"), REFUSED, why="ModelError: two lists"),
            Verdict(find_variant("phimoe", "plain"), DISCONTINUOUS, "depth", 0.9),
            Verdict(find_variant("gpt2", "eager"), NO_VARIANT),
        ],
        n_variants=2085,
    )
    assert "`families.csv` lists 5 of 2,085 model variants, measured with one version" in text
    assert "| llama | documents; depth: eager |  |" in text
    assert "by at most 3e-05 nats" in text
    assert "| hrm_text | – | refused (two lists): all |" in text
    assert "discontinuous by 0.9 nats: all" in text
    assert "exact: 2, refused: 1, discontinuous: 1, silently wrong: 0, crashed: 0" in text
    assert "| reads in both directions: an encoder | bert, bert-generation, " in text


def test_verdicts_are_read_as_they_were_kept(tmp_path) -> None:
    path = tmp_path / "families.csv"
    todo = list(variants("llama"))[:3]
    verdicts = [
        Verdict(todo[0], EXACT, "tokens", 1e-5, "why, and how", (1, 2), state="abc"),
        Verdict(todo[1], CRASH, why="out of memory", state="abc"),
        Verdict(todo[2], REFUSED, state="def"),
    ]
    assert read_verdicts(path) == []
    write_verdicts(verdicts[::-1], path)
    assert [
        (str(verdict.variant), verdict.verdict, verdict.why) for verdict in read_verdicts(path)
    ] == sorted((str(verdict.variant), verdict.verdict, verdict.why) for verdict in verdicts)
    (exact_verdict,) = (verdict for verdict in read_verdicts(path) if verdict.verdict == EXACT)
    assert vars(exact_verdict) == {**vars(verdicts[0]), "variant": exact_verdict.variant}


def test_a_survey_goes_on_and_looks_again_at_what_failed_and_what_other_code_found() -> None:
    todo = list(variants("llama"))[:4]
    verdicts = [
        Verdict(todo[0], EXACT, "tokens", state="now"),
        Verdict(todo[1], CRASH, state="now"),
        Verdict(todo[2], EXACT, "tokens", state="before"),
    ]
    assert find_remaining(todo, verdicts, "now") == todo[1:]


def test_what_is_said_about_the_code_is_no_other_code() -> None:
    code = "def add(a, b):\n    return a + b\n"
    commented = 'def add(a, b):\n    """Add."""\n    # Both are numbers.\n    return a + b\n'
    assert census.without_comments(code) == census.without_comments(commented)
    assert census.without_comments(code) != census.without_comments(code.replace("+", "-"))


def test_the_pages_of_the_docs_are_those_of_the_verdicts() -> None:
    """`make families` writes all three; none is edited."""
    verdicts = read_verdicts()
    text = census.FAMILIES_PAGE.read_text()
    assert text.endswith(census.table(verdicts))
    n_held, n_variants = re.search(
        r"`families.csv` lists ([\d,]+) of ([\d,]+) model variants", text
    ).groups()
    assert n_held == f"{len(verdicts):,}"
    assert not [verdict for verdict in verdicts if verdict.verdict in survey.FAILURES]
    short = (
        census.MODELS_PAGE.read_text()
        .partition(census.TABLE_BEGIN)[2]
        .partition(census.TABLE_END)[0]
    )
    assert short == census.short_table(verdicts, int(n_variants.replace(",", "")))


def test_the_page_lists_the_families_whose_heads_or_experts_are_refused():
    rows = [line.split("|") for line in census.MODELS_PAGE.read_text().splitlines()]
    listed = {"heads": {}, "experts": {}}
    for _, part, reason, names, _ in (row for row in rows if len(row) == 5):
        if part.strip() in listed:
            listed[part.strip()] |= dict.fromkeys(names.strip().split(", "), reason.strip())
    refusals, calls = {"heads": {}, "experts": set()}, Counter()

    def count(module, query, *_, **__):
        calls[module] += 1
        return query.transpose(1, 2).contiguous(), None

    extra_settings = {"doge": {"is_moe": True}, "gemma4_text": {"enable_moe_block": True}}
    extra_settings["granitemoehybrid"] = {"layer_types": ["linear_attention", "full_attention"] * 2}
    for family in families():
        model = make_registered(family, **extra_settings.get(family, {}))
        try:
            anatomy = LayerAnatomy.of(model)
        except ModelError:
            continue
        layers = anatomy.layers
        name, config = family.removesuffix("_text"), model.config.get_text_config()
        if parts_of_config(config).head and not any(anatomy.find(Heads)):
            calls.clear()
            with _replaced_attention(model, count), suppress(RuntimeError):
                model(torch.arange(1, 7)[None], use_cache=False)
            refusals["heads"][name] = sum(calls[module] for module in layers[-1].modules())
        paths = [path for path, _ in layers[-1].named_modules()]
        holds = any("expert" in path for path in paths) or family == "doge"
        if holds and not any(anatomy.find(Experts)):
            refusals["experts"].add(name)
    assert {*listed["experts"]} == refusals["experts"]
    assert {*listed["heads"]} == {*refusals["heads"]}
    for name, n_calls in refusals["heads"].items():
        reason = listed["heads"][name]
        assert ("does not call" in reason, "several times" in reason) == (
            not n_calls,
            n_calls > 1,
        ), name
