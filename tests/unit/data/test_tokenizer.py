"""Tokenizers: lossless, saved and loaded, specials counted, the fast one equal to the slow one."""

from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models

from open_mythos.data import network
from open_mythos.data.tokenizer import (
    BPE,
    Bytes,
    ByteTokenizer,
    CoreTokenizer,
    HubTokenizer,
    Tokenizer,
    byte_core,
    load_tokenizer,
    tokenizer_named,
)
from open_mythos.tokenizer import MythosTokenizer, get_vocab_size
from open_mythos.tokenizer import load_tokenizer as load_public

CORPUS = [
    "def area(width, height):\n    return width * height\n",
    "the cat sat on the mat; the cat ate. " * 9,
]
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return BPE(vocab_size=280).build(CORPUS)


@settings(deadline=None, max_examples=60)
@given(texts)
def test_no_text_is_lost(text: str) -> None:
    for tokenizer in (ByteTokenizer(), BPE_280):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.vocab_size for i in ids)


BPE_280 = BPE(vocab_size=280).build(CORPUS)


@settings(deadline=None, max_examples=60)
@given(texts)
def test_bytes_equals_its_slow_twin(text: str) -> None:
    slow = CoreTokenizer(byte_core(), "<|eos|>", "<|bos|>", "<|pad|>")
    fast = ByteTokenizer()
    assert fast.encode(text) == slow.encode(text)
    assert (fast.vocab_size, fast.eos, fast.bos, fast.pad) == (slow.vocab_size, slow.eos, slow.bos, slow.pad)


def test_bpe_is_shorter_than_bytes_and_the_same_each_time(bpe: Tokenizer) -> None:
    assert len(bpe.encode(CORPUS[1])) < len(CORPUS[1]) / 2
    again = BPE(vocab_size=280).build(iter(CORPUS))
    assert again.encode(CORPUS[0]) == bpe.encode(CORPUS[0])
    assert bpe.encode_batch(CORPUS) == [bpe.encode(text) for text in CORPUS]


def test_text_that_spells_a_special_token_stays_text(bpe: Tokenizer) -> None:
    for tokenizer in (bpe, ByteTokenizer()):
        ids = tokenizer.encode("before <|eos|> after")
        assert tokenizer.eos not in ids
        assert tokenizer.decode(ids) == "before <|eos|> after"
        assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.eos]) == "a"


@pytest.mark.parametrize("config", [Bytes(), BPE(vocab_size=280)])
def test_saved_and_loaded_it_is_the_same(config: Bytes | BPE, tmp_path: Path) -> None:
    built = config.build(CORPUS)
    built.save(tmp_path / "deep" / "folder")
    loaded = load_tokenizer(tmp_path / "deep" / "folder")
    assert type(loaded) is type(built)
    assert loaded.encode(CORPUS[0]) == built.encode(CORPUS[0])
    assert (loaded.vocab_size, loaded.eos, loaded.bos, loaded.pad) == (
        built.vocab_size,
        built.eos,
        built.bos,
        built.pad,
    )
    raw = tokenizers.Tokenizer.from_file(str(tmp_path / "deep" / "folder" / "tokenizer.json"))
    assert raw.encode(CORPUS[0], add_special_tokens=False).ids == built.encode(CORPUS[0])


def test_special_tokens_count(tmp_path: Path) -> None:
    """The original's vocab_size left them out, so ids of special tokens fell outside the embedding."""
    core = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    core.add_special_tokens(["<|endoftext|>"])
    core.save(str(tmp_path / "tokenizer.json"))
    mythos = MythosTokenizer(str(tmp_path))
    assert mythos.vocab_size == 4 == get_vocab_size(str(tmp_path)) == load_public(str(tmp_path)).vocab_size
    assert mythos.eos == 3
    assert mythos.encode("a") == [0]
    assert mythos.decode([0, 3]) == "a"


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 259"):
        BPE(vocab_size=100)
    with pytest.raises(ValueError, match="too short for a BPE"):
        BPE(vocab_size=5000).build(["hello"])
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="not a readable tokenizer"):
        load_tokenizer(tmp_path)
    tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="which token ends a text"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="no tokenizer 'word'"):
        tokenizer_named("word")


def test_names_users_type(tmp_path: Path) -> None:
    assert tokenizer_named("bytes") == Bytes()
    assert tokenizer_named("bpe", 300) == BPE(vocab_size=300)
    assert tokenizer_named("openai/gpt-oss-20b") == HubTokenizer()
    assert tokenizer_named(str(tmp_path)) == HubTokenizer(name=str(tmp_path))


def test_offline_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # nobody listens there
    network.hub_in_reach.cache_clear()
    try:
        with pytest.raises(ValueError, match="cannot be reached; go online, or use `bytes`"):
            MythosTokenizer("nobody/such-tokenizer")
    finally:
        network.hub_in_reach.cache_clear()
