"""A call that promises greedy decoding keeps the promise, whatever the model's `generation_config` says."""

import copy
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)

import kvloom
from kvloom.blend.blender import Blender
from kvloom.connectors.hf.connector import TransformersConnector
from kvloom.kvstore.store import KVStore
from kvloom.kvstore.tiers.host import HostTier
from kvloom.retrieval.settings import Retrieval

from ..support.models import DOCUMENTS, QUESTION, make_model, make_tokenizer
from .test_retrieval import Logits, prompts

EXACT = Retrieval("exact", budget_ratio=1.0, break_even_tokens=0)
NEW_TOKENS = 10

# Settings that say how tokens are found, or what `generate` returns: nothing of that is a greedy call's affair.
OVERRIDDEN = [
    ("use_cache", False),
    ("do_sample", True),
    ("num_beams", 3),
    ("num_return_sequences", 2),
    ("return_dict_in_generate", True),
    ("output_scores", True),
    ("output_logits", True),
    ("output_attentions", True),
    ("output_hidden_states", True),
    ("cache_implementation", "static"),
    ("cache_implementation", "quantized"),
    ("cache_implementation", "offloaded"),
    ("max_cache_len", 600),
    ("prompt_lookup_num_tokens", 3),
    ("assistant_early_exit", 1),
    ("is_assistant", True),
    ("max_length", 21),
    ("max_length", 4000),
    ("max_new_tokens", 3),
    ("token_healing", True),
    ("prefill_chunk_size", 4),
    ("penalty_alpha", 0.6),
    ("dola_layers", "low"),
    ("num_beam_groups", 3),
    ("diversity_penalty", 0.5),
    ("early_stopping", True),
    ("length_penalty", 2.0),
    ("force_words_ids", [[5]]),
    ("low_memory", True),
    ("temperature", 0.3),
    ("top_k", 2),
    ("top_p", 0.5),
    ("min_p", 0.1),
    ("typical_p", 0.5),
    ("epsilon_cutoff", 0.01),
    ("eta_cutoff", 0.01),
]
# Settings that say which tokens are allowed or end an answer: they hold, as in stock greedy decoding.
KEPT: dict[str, Callable[[list[int]], object]] = {
    "repetition_penalty": lambda plain: 1.4,
    "no_repeat_ngram_size": lambda plain: 1,
    "bad_words_ids": lambda plain: [[plain[1]], [7, 8]],
    "suppress_tokens": lambda plain: plain[1:3],
    "begin_suppress_tokens": lambda plain: plain[:1],
    "forced_eos_token_id": lambda plain: 17,
    "min_length": lambda plain: 151,
    "min_new_tokens": lambda plain: 9,
    "exponential_decay_length_penalty": lambda plain: (1, 3.0),
    "sequence_bias": lambda plain: [[[plain[1]], -30.0]],
    "guidance_scale": lambda plain: 3.0,
    "renormalize_logits": lambda plain: True,
    "remove_invalid_values": lambda plain: True,
}


@pytest.fixture
def model() -> PreTrainedModel:
    return make_model("llama", max_position_embeddings=2048)


def connect(model: PreTrainedModel) -> TransformersConnector:
    store, blender = KVStore([HostTier(None)]), Blender(recompute_ratio=1.0)
    return TransformersConnector(model, make_tokenizer(bos=True), store, blender, model_id="m")


def prompt_ids(rag: TransformersConnector) -> list[int]:
    documents = [token for document in DOCUMENTS for token in rag.encode_document(document)]
    return [*rag.lead_ids, *documents, *rag.encode_question(QUESTION)]


def answered(rag: TransformersConnector) -> str:
    return rag.answer(DOCUMENTS, QUESTION, max_new_tokens=NEW_TOKENS)


def said(rag: TransformersConnector, **options: object) -> list[int]:
    """What a session says to the same tokens."""
    out = rag.generate(prompt_ids(rag), retrieval=EXACT, max_new_tokens=NEW_TOKENS, **options)
    return list(out.token_ids[0])


def stock(rag: TransformersConnector, ids: Sequence[int] | None = None, **options: object) -> list[int]:
    """The model's own greedy decoding, configuration included."""
    asked = torch.tensor([prompt_ids(rag) if ids is None else list(ids)])
    out = rag.model.generate(
        asked,
        attention_mask=torch.ones_like(asked),
        **{"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0, **options},
    )
    return out[0, asked.shape[1] :].tolist()


@pytest.fixture
def silent(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No warning, neither of Python nor in the log of transformers."""
    log = logging.getLogger("transformers")
    log.addHandler(caplog.handler)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    log.removeHandler(caplog.handler)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize(("name", "value"), OVERRIDDEN, ids=[f"{name} {value}" for name, value in OVERRIDDEN])
def test_a_configuration_does_not_change_a_greedy_answer(
    model: PreTrainedModel, silent: None, name: str, value: object
) -> None:
    rag = connect(model)
    text, tokens = answered(rag), said(rag)
    assert tokens == stock(rag)
    setattr(model.generation_config, name, value)
    before = model.generation_config.to_dict()
    assert answered(rag) == text
    assert said(rag) == tokens
    assert model.generation_config.to_dict() == before


@pytest.mark.parametrize("name", KEPT)
def test_what_the_model_allows_holds_as_in_stock_decoding(model: PreTrainedModel, silent: None, name: str) -> None:
    rag = connect(model)
    plain = stock(rag)
    model.generation_config.eos_token_id = 511 if name == "forced_eos_token_id" else plain[7]
    before = stock(rag)
    setattr(model.generation_config, name, KEPT[name](plain))
    expected = stock(rag)
    assert len(before) >= 7 and (expected != before or name in ("remove_invalid_values", "renormalize_logits"))
    assert said(rag) == expected
    assert answered(rag) == rag.tokenizer.decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize("kind", [lambda ids: ids, tuple, torch.tensor], ids=["list", "tuple", "tensor"])
def test_several_end_tokens(model: PreTrainedModel, kind: Callable[[list[int]], object]) -> None:
    rag = connect(model)
    plain = stock(rag)
    ends = [510, plain[5], plain[3]]
    first = min(plain.index(end) for end in ends[1:])
    assert said(rag, eos_token_id=kind(ends)) == plain[: first + 1]
    model.generation_config.eos_token_id = ends
    assert said(rag) == plain[: first + 1] == stock(rag)
    assert said(rag, eos_token_id=[]) == plain
    assert answered(rag) == rag.tokenizer.decode(plain[: first + 1], skip_special_tokens=True)


@pytest.fixture(scope="module")
def bundled() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """It writes text."""
    folder = Path(kvloom.__file__).parent / "bench" / "reference" / "model"
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


def test_stop_strings_end_answers_and_rows(
    bundled: tuple[PreTrainedModel, PreTrainedTokenizerBase], silent: None
) -> None:
    """Of the configuration and of a call; a row that has ended takes no padding into its conversation."""
    model, tokenizer = copy.deepcopy(bundled[0]), bundled[1]
    rag = TransformersConnector(model, tokenizer, KVStore([HostTier(None)]), model_id="m")
    texts = ["Record: the code of Alice is 4821.\nQ: What is the code of Alice?\nA:", "The old man"]
    ids = [rag.encode_question(text) for text in texts]
    plain = [stock(rag, row) for row in ids]
    place, stop = 2, "."
    assert tokenizer.decode(plain[0]).index(stop) == 5 and stop not in tokenizer.decode(plain[1])
    stopped = plain[0][: place + 1]
    with rag.session(EXACT) as session:
        out = session.generate(ids, max_new_tokens=NEW_TOKENS, stop_strings=[stop], tokenizer=tokenizer)
        assert [list(row) for row in out.token_ids] == [stopped, plain[1]]
        assert session.token_ids == [ids[0] + stopped, ids[1] + plain[1]]
        more = rag.encode_question(" and then")
        again = session.generate([more, more], max_new_tokens=4)
    assert list(again.token_ids[0]) == stock(rag, ids[0] + stopped + more, max_new_tokens=4)
    model.generation_config.stop_strings = [stop]
    assert list(rag.generate(texts[0], retrieval=EXACT, max_new_tokens=NEW_TOKENS).token_ids[0]) == stopped
    assert rag.answer(["The sea."], texts[0], max_new_tokens=40).count(stop) <= 1


def test_criteria_of_the_caller_end_rows(model: PreTrainedModel) -> None:
    class AfterTwo(StoppingCriteria):
        """Ends the second row after its second token."""

        calls = 0

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
            self.calls += 1
            return torch.tensor([False, self.calls == 2])

    rag = connect(model)
    ids = prompts(300, 200)
    plain = [stock(rag, row) for row in ids]
    for given in (lambda c: c, lambda c: [c], lambda c: StoppingCriteriaList([c])):
        out = rag.generate(ids, retrieval=EXACT, max_new_tokens=NEW_TOKENS, stopping_criteria=given(AfterTwo()))
        assert [list(row) for row in out.token_ids] == [plain[0], plain[1][:2]]


def test_padding_in_front_of_a_row_does_not_count_as_said(model: PreTrainedModel) -> None:
    """A penalty for repeating looks at the tokens of the row alone, whatever stands beside it."""
    rag = connect(model)
    model.generation_config.repetition_penalty = 1.5
    model.generation_config.eos_token_id = 3
    ids = prompts(300, 40)
    out = rag.generate(ids, retrieval=EXACT, max_new_tokens=NEW_TOKENS)
    assert [list(row) for row in out.token_ids] == [stock(rag, row) for row in ids]


def test_sampling_is_there_for_those_who_ask(model: PreTrainedModel, silent: None) -> None:
    rag = connect(model)
    model.generation_config.temperature = 3.0
    greedy = said(rag)
    torch.manual_seed(0)
    sampled = [said(rag, do_sample=True) for _ in range(3)]
    assert sum(row == greedy for row in sampled) <= 1
    torch.manual_seed(0)
    assert said(rag, do_sample=True) == sampled[0]
    assert said(rag, do_sample=True, temperature=0.7, top_k=1) == greedy
    config = GenerationConfig(do_sample=True, top_k=1, temperature=0.5)
    assert said(rag, generation_config=config) == greedy
    assert said(rag, generation_config=GenerationConfig(repetition_penalty=1.4)) == stock(rag, repetition_penalty=1.4)
    with pytest.raises(TypeError, match="generation_config is of type dict; expected a GenerationConfig"):
        said(rag, generation_config={"top_k": 1})


def test_options_that_pass_through(model: PreTrainedModel, capsys: pytest.CaptureFixture[str]) -> None:
    rag = connect(model)
    logits = Logits()
    tokens = said(rag, logits_processor=LogitsProcessorList([logits]))
    assert len(logits.seen) == NEW_TOKENS and tokens == stock(rag)
    allowed = said(rag, prefix_allowed_tokens_fn=lambda row, ids: [5, 6])
    assert set(allowed) <= {5, 6}
    said(rag, streamer=TextStreamer(rag.tokenizer))
    assert capsys.readouterr().out
    for harmless in (
        {"num_beams": 1},
        {"use_cache": True},
        {"early_stopping": True},
        {"temperature": 1.0},
        {"top_k": None},
    ):
        assert said(rag, **harmless) == tokens


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_beams": 2}, "num_beams is 2; a session sets it itself"),
        ({"num_return_sequences": 2}, "num_return_sequences is 2; a session"),
        ({"use_cache": False}, "use_cache is False; a session"),
        ({"cache_implementation": "static"}, "cache_implementation is 'static'; a session"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate is True; a session"),
        ({"output_scores": True}, "output_scores is True; a session"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens is 3; a session"),
        ({"assistant_model": make_model("llama")}, "assistant_model is of type LlamaForCausalLM; a session"),
        ({"custom_generate": "someone/code"}, "custom_generate is 'someone/code'; a session"),
        ({"past_key_values": object()}, "past_key_values is of type object; a session"),
        ({"cache": object()}, "cache is of type object; a session"),
        ({"attention_mask": torch.ones(1, 3)}, "attention_mask is of type Tensor; a session"),
        ({"token_healing": True}, "token_healing is True; a session"),
        ({"generation_config": GenerationConfig(num_beams=4)}, "num_beams is 4; a session"),
        ({"max_length": 200}, "max_length is among the options; give max_new_tokens"),
        ({"generation_config": GenerationConfig(max_new_tokens=5)}, "max_new_tokens is among the options"),
        ({"temperature": 0.7}, "temperature is 0.7, but nothing is sampled; give do_sample=True"),
        ({"top_kk": 3}, "top_kk is no option of model.generate; check its spelling"),
        ({"logits_processors": []}, "logits_processors is no option"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_that_break_a_session_are_refused_before_anything_is_computed(
    model: PreTrainedModel, options: dict[str, object], words: str
) -> None:
    rag = connect(model)
    with rag.session(EXACT) as session:
        first = session.generate(prompts(40), max_new_tokens=2).token_ids
        before = session.token_ids
        with pytest.raises(ValueError, match=words) as caught:
            session.generate(prompts(30), max_new_tokens=4, **options)
        assert "\n" not in str(caught.value)
        assert session.token_ids == before
        session.generate(prompts(30), max_new_tokens=4)  # nothing has happened to it
        assert session.token_ids[0][:42] == prompts(40)[0] + list(first[0])
