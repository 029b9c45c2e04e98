"""Questions for any model: splits kept apart, facts where they are said to be, scores of answers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from kvloom.blend.blender import CACHEBLEND, Blender
from kvloom.evaluation.answers import (
    Answer,
    cached_logits,
    context_kv,
    difference_of,
    full_logits,
    gap_closed,
    ratio_of,
    score_answer,
)
from kvloom.evaluation.models import load_model
from kvloom.evaluation.passages import load_heldout, load_questions
from kvloom.evaluation.placed import FusionBed
from kvloom.evaluation.questions import ANSWERED, KINDS, Question, QuestionSampler
from kvloom.evaluation.wording import INSTRUCTIONS, Frame, chat_parts, frame_of

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }} [end]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_model(None, device="cpu")[1]


def text_of(tokenizer: PreTrainedTokenizerBase, question: Question) -> str:
    return str(tokenizer.decode(question.context))


@pytest.mark.parametrize("kind", KINDS)
def test_equal_numbers_give_equal_questions_others_differ(tokenizer: PreTrainedTokenizerBase, kind: str) -> None:
    sampler = QuestionSampler(tokenizer, context_tokens=400)
    first, again, other = sampler.sample(kind, 3), sampler.sample(kind, 3), sampler.sample(kind, 4)
    assert first == again != other
    assert len(first.documents) == 8 and all(first.documents)
    assert first.asked and first.answer
    assert 200 < len(first.context) < 600
    assert all(first.answer[a:b] for a, b in first.values)
    assert bool(first.values) == (kind in ANSWERED)


def test_splits_share_nothing(tokenizer: PreTrainedTokenizerBase) -> None:
    tune, check = load_questions("tune"), load_questions("check")
    assert len(tune) + len(check) == 100 and len(tune) > 20
    assert {p for q in tune for p in q.passages}.isdisjoint(p for q in check for p in q.passages)
    assert set(load_heldout("tune")).isdisjoint(line for line in load_heldout("check") if len(line) > 80)
    names: list[set[str]] = []
    for split in ("tune", "check"):
        sampler = QuestionSampler(tokenizer, split=split, context_tokens=400)
        found = set()
        for number in range(20):
            answer = tokenizer.decode(sampler.sample("extract", number).answer)
            found |= {line.split(":")[0].strip() for line in answer.splitlines() if ":" in line}
        names.append(found)
    assert min(map(len, names)) > 50
    assert names[0].isdisjoint(names[1])
    with pytest.raises(ValueError, match="split is 'test'; expected one of tune, check"):
        QuestionSampler(tokenizer, split="test")


def test_facts_astride_are_cut_by_borders(tokenizer: PreTrainedTokenizerBase) -> None:
    question = QuestionSampler(tokenizer, context_tokens=400).sample("astride", 0)
    texts = [tokenizer.decode(document) for document in question.documents]
    heads = [text.rsplit(" The ", 1)[1].split(" of ")[1] for text in texts[:-1]]
    values = [text.removeprefix(" is ")[:4] for text in texts[1:]]
    asked = tokenizer.decode(question.question).split(" of ")[1].split("?")[0]
    assert tokenizer.decode(question.answer) == f" {values[heads.index(asked)]}."
    assert all(value not in text for value in values for text in texts[:1])


def test_questions_about_one_context(tokenizer: PreTrainedTokenizerBase) -> None:
    sampler = QuestionSampler(tokenizer, context_tokens=400, num_documents=4)
    found = sampler.about_context("astride", 0, most=9)
    assert len(found) == 3, "as many as there are borders"
    assert found[0] == sampler.sample("astride", 0)
    assert len({one.answer for one in found}) == len({tuple(one.asked) for one in found}) == 3
    assert len({(one.documents, one.group, one.number) for one in found}) == 1
    assert [len(of) for of in sampler.contexts("astride", 8, most=3)] == [3, 3, 2]
    assert [len(of) for of in sampler.contexts("multihop", 2, most=3)] == [1, 1]


def test_extraction_asks_for_every_value(tokenizer: PreTrainedTokenizerBase) -> None:
    question = QuestionSampler(tokenizer, context_tokens=600).sample("extract", 0)
    values = [tokenizer.decode(question.answer[a:b]).strip() for a, b in question.values]
    assert len(set(values)) >= 10
    assert all(f"is {value}." in text_of(tokenizer, question) for value in values)


def test_single_facts_of_an_extraction(tokenizer: PreTrainedTokenizerBase) -> None:
    sampler = QuestionSampler(tokenizer, context_tokens=600)
    whole, *singles = sampler.extraction(0, singles=4)
    assert whole == sampler.sample("extract", 0)
    assert [each.kind for each in singles] == ["needle12"] * 4
    assert {each.group for each in singles} == {whole.group} and {
        each.context == whole.context for each in singles
    } == {True}
    listed = {tokenizer.decode(whole.answer[a:b]).strip() for a, b in whole.values}
    values = [tokenizer.decode(each.answer[a:b]).strip(" .") for each in singles for a, b in each.values]
    assert len(values) == 4 and set(values) <= listed
    for each, value in zip(singles, values, strict=True):
        name = tokenizer.decode(each.asked).split(" of ")[1].split("?")[0]
        assert f"of {name} is {value}." in text_of(tokenizer, whole)


def test_excerpts_hold_the_gold_answer(tokenizer: PreTrainedTokenizerBase) -> None:
    sampler = QuestionSampler(tokenizer, context_tokens=800)
    for number in range(8):
        question = sampler.sample("multihop", number)
        assert tokenizer.decode(question.answer).strip() in text_of(tokenizer, question)


def test_text_goes_on_behind_its_documents(tokenizer: PreTrainedTokenizerBase) -> None:
    question = QuestionSampler(tokenizer, context_tokens=300).sample("text", 2)
    page = "\n".join(load_heldout("check"))
    whole = tokenizer.decode([*question.context[len(question.lead) :], *question.asked, *question.answer])
    assert whole[10:-10] in page


def test_a_chat_template_frames_context_and_question(tokenizer: PreTrainedTokenizerBase) -> None:
    assert chat_parts(tokenizer) is None
    plain = frame_of(tokenizer)
    assert not plain.is_chat and plain.lead_ids == (tokenizer.bos_token_id,)
    chatty = load_model(None, device="cpu")[1]
    chatty.chat_template = TEMPLATE
    opening, closing = chat_parts(chatty) or ("", "")
    assert opening == f"{chatty.bos_token}[user] " and closing == " [end][assistant]"
    frame = frame_of(chatty)
    assert frame.is_chat and frame.lead_ids[0] == chatty.bos_token_id
    question = QuestionSampler(chatty, context_tokens=400).sample("needle", 0)
    assert question.lead == frame.lead_ids
    assert tokenizer.decode(question.question).endswith("[end][assistant]")
    assert tokenizer.decode(question.begun).startswith("The special magic number for ")
    chatty.chat_template = "{{ raise_exception('no') }}"
    assert chat_parts(chatty) is None


def test_scores_tell_right_from_wrong(tokenizer: PreTrainedTokenizerBase) -> None:
    question = QuestionSampler(tokenizer, context_tokens=600).sample("extract", 1)
    gold = torch.tensor(question.answer)
    sharp = torch.nn.functional.one_hot(gold, len(tokenizer)).float() * 50
    exact = score_answer(question, sharp, sharp)
    assert (exact.right, exact.values_right, exact.kl) == (True, 1.0, 0.0)
    assert exact.nll < 1e-6
    spoilt = sharp.clone()
    spoilt[question.values[0][0]] = sharp[question.values[0][0]].roll(1)
    wrong = score_answer(question, spoilt, sharp)
    assert wrong.right is False
    assert wrong.values_right == pytest.approx(1 - 1 / len(question.values))
    assert wrong.kl == pytest.approx(50 / len(gold), rel=1e-3)
    with pytest.raises(ValueError, match="logits have shapes"):
        score_answer(question, sharp[1:], sharp)


def test_questions_about_one_context_are_answered_as_alone() -> None:
    """In one padded pass behind its KV, and by fusions that serve all of them or belong to one."""
    model, tokenizer = load_model(None, device="cpu")
    sampler = QuestionSampler(tokenizer, context_tokens=200, num_documents=4)
    questions = sampler.about_context("astride", 1, most=3)
    longer = replace(questions[2], begun=(*questions[2].question, *questions[2].begun))
    asked = [questions[0], questions[1], longer]
    together = cached_logits(model, *context_kv(model, questions[0].context), asked)
    for one, found in zip(asked, together, strict=True):
        torch.testing.assert_close(found, full_logits(model, one), atol=2e-4, rtol=1e-4)
    bed = FusionBed(model, model_id="bundled")
    placed = bed.place(questions[0])
    for blender in (Blender(0.2), CACHEBLEND):
        together, share = bed.fused_logits(asked, placed, blender)
        alone = [bed.fused_logits([one], placed, blender) for one in asked]
        assert share == pytest.approx(sum(of_one for _, of_one in alone) / 3)
        for found, ((of_one,), _) in zip(together, alone, strict=True):
            torch.testing.assert_close(found, of_one, atol=2e-4, rtol=1e-4)
    assert (together[0] - cached_logits(model, placed.keys, placed.values, asked)[0]).abs().max() > 1e-2


def test_the_bundled_model_answers_through_frames_of_its_own() -> None:
    model, tokenizer = load_model(None, device="cpu")
    sampler = QuestionSampler(tokenizer, context_tokens=400)
    rights = []
    for number in range(4):
        question = sampler.sample("astride", number)
        logits = full_logits(model, question)
        rights.append(score_answer(question, logits, logits).right)
    assert sum(map(bool, rights)) >= 3


def answers(values: list[float], groups: list[str]) -> list[Answer]:
    return [Answer("text", i, g, None, None, v, v) for i, (v, g) in enumerate(zip(values, groups, strict=True))]


def test_summaries_pair_questions_and_count_groups_once() -> None:
    groups = ["a", "a", "b", "c"]
    naive, full, other = answers([2, 4, 3, 3], groups), answers([1, 1, 1, 1], groups), answers([1, 3, 2, 2], groups)
    value, low, high = gap_closed(naive, full, other)
    assert value == pytest.approx(0.5) and low == pytest.approx(0.5) and high == pytest.approx(0.5)
    assert ratio_of(other, naive)[0] == pytest.approx(2 / 3)
    assert difference_of(other, full)[0] == pytest.approx(1.0)
    assert math.isnan(gap_closed(full, full, other)[0])


def test_an_unknown_kind_or_too_short_a_context_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match="kind is 'riddle'"):
        QuestionSampler(tokenizer).sample("riddle", 0)
    with pytest.raises(ValueError, match="at least 16 tokens each"):
        QuestionSampler(tokenizer, context_tokens=64, num_documents=8)
    assert isinstance(frame_of(tokenizer), Frame)
    assert INSTRUCTIONS.answer.count("{value}") == 1
