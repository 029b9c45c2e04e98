"""Salts: nothing for nothing, and different as soon as one part differs; lead tokens."""

from itertools import product

from kvloom.connectors.hf.answering import Prompt, chat_prompt
from kvloom.connectors.identity.requests import chat_parts, chunk_salt, lead_of, natural_lead

from ..support.models import make_tokenizer


def test_every_part_counts() -> None:
    assert chunk_salt() == b""
    names = ("tenant", "epoch", "cache_salt", "adapter", "decoding")
    values = (b"", b"a", b"b", b"ab", b"\0", b"tenant")
    one = {chunk_salt(**{name: value}) for name, value in product(names, values)}
    assert len(one) == 1 + len(names) * (len(values) - 1)
    two = {chunk_salt(tenant=a, adapter=b) for a, b in product(values, values)}
    assert len(two) == len(values) ** 2


def test_parts_may_be_put_together_in_order() -> None:
    """Where one half of an engine knows some and the other half the rest."""
    assert chunk_salt(tenant=b"t", epoch=b"e") + chunk_salt(cache_salt=b"c", decoding=b"d") == chunk_salt(
        tenant=b"t", epoch=b"e", cache_salt=b"c", decoding=b"d"
    )


def test_lead_tokens_are_the_tokenizers() -> None:
    assert lead_of(make_tokenizer(bos=True)) == (0,)
    assert lead_of(make_tokenizer(bos=False)) == ()


def test_the_natural_lead_is_what_a_chat_template_puts_in_front() -> None:
    plain, chat = make_tokenizer(bos=True), make_tokenizer(bos=True)
    assert natural_lead(plain) == lead_of(plain)
    chat.chat_template = "you are {{ messages[0]['role'] }}: {{ messages[0]['content'] }} answer:"
    assert natural_lead(chat) == tuple(chat("you are user: ", add_special_tokens=False).input_ids) != ()
    for broken in ("{{ raise_exception('no') }}", "nothing of it", "{{ messages[0]['content'] | upper }}"):
        chat.chat_template = broken
        assert natural_lead(chat) == (0,)
    chat.chat_template = "{{ messages[0]['content'] }} end"
    assert natural_lead(chat) == (0,), "nothing before the text"


def test_chats_are_cut_in_front_of_the_first_users_words() -> None:
    tokenizer = make_tokenizer(bos=True)
    tokenizer.chat_template = None
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    assert chat_prompt(tokenizer, said, has_documents=True) == Prompt("Be brief.\nWho?")
    one = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}[assistant]"
    tokenizer.chat_template = "{{ bos_token }}" + one
    assert chat_prompt(tokenizer, said, has_documents=True) == Prompt("Who?[assistant]", "[system] Be brief.[user] ")
    assert chat_prompt(tokenizer, said, has_documents=False) == Prompt("[system] Be brief.[user] Who?[assistant]")
    assert chat_parts(tokenizer) == (f"{tokenizer.bos_token}[user] ", "[assistant]")
    tokenizer.chat_template = one + one
    assert chat_parts(tokenizer) is None
    twice = "[system] Be brief.[user] Who?[assistant]" * 2
    assert chat_prompt(tokenizer, said, has_documents=True) == Prompt(twice), "no mark is left in a text"
