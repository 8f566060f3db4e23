"""Token ids made elsewhere: with the tokenizer beside them, and as bare numbers."""

import numpy as np
import pytest
import tokenizers
from tokenizers import models

from open_mythos.data.corpus import Reading, Streamed
from open_mythos.data.token_files import TokenFiles
from open_mythos.data.tokenizer import ByteTokenizer
from open_mythos.train.recipe import data_named
from open_mythos.train.recipes import RECIPES

TEXT = "The loop reads the same block again and again. " * 40


def test_ids_with_their_tokenizer(tmp_path):
    """The same rows and the same text as the ids stand for, whatever the file and wherever it is cut."""
    tokenizer, ids = ByteTokenizer(), ByteTokenizer().encode(TEXT)
    tokenizer.save(tmp_path)
    np.save(tmp_path / "a.npy", np.array(ids[:700]))
    np.array(ids[700:], dtype="<u2").tofile(tmp_path / "b.bin")
    corpus = TokenFiles(paths=(str(tmp_path / "a.npy"), str(tmp_path / "b.bin")), held_out=0.1).build()
    training, held_out = (part.read(0, len(part)).tolist() for part in (corpus.training, corpus.held_out))
    assert training + held_out == ids
    assert len(held_out) == round(0.1 * len(ids)) == corpus.held_out.text_bytes
    assert corpus.tokenizer.decode(held_out) == TEXT[-len(held_out) :]
    batch = next(iter(corpus.loader(Reading(length=8, batch=2))))
    assert batch.tokens.shape == (2, 8)


def test_ids_without_one_are_numbers(tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(100, dtype=np.int32) % 12)
    corpus = TokenFiles(paths=(str(tmp_path / "ids.npy"),)).build()
    assert corpus.tokenizer.vocab_size == 13
    assert corpus.tokenizer.decode([3, 11]) == "3 11"
    assert corpus.tokenizer.encode("3 11") == [3, 11]
    assert len(corpus.training) == 95


def test_the_command_line_knows_them(tmp_path):
    path = tmp_path / "ids.npy"
    np.save(path, np.arange(100))
    assert data_named([str(path)], RECIPES["tiny"]()) == TokenFiles(paths=(str(path),))
    streaming = RECIPES["tiny"]().replace(data=Streamed())
    path = tmp_path / "some.txt"
    path.write_text(TEXT)
    assert data_named([str(path)], streaming).source.paths == (str(path),)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.npy", np.zeros((2, 3), int), r"one row of whole numbers, the token ids; it holds int64 of shape"),
        ("a.npy", np.zeros(3), "it holds float64 of shape"),
        ("a.npy", np.array([], int), r"int64 of shape \(0,\)"),
        ("a.npy", np.array([1, -4]), "holds the id -4; ids are counted from 0"),
        ("a.npy", np.array([{}], dtype=object), "cannot read token ids from"),
        ("a.npy", b"no array", "cannot read token ids from"),
        ("a.npy", b"", "cannot read token ids from"),
        ("a.bin", b"abc", "3 bytes are no row of uint16; say what they are"),
        ("a.bin", b"", "0 bytes are no row of uint16"),
    ],
)
def test_what_is_no_row_of_ids(tmp_path, name, content, says):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content)
    with pytest.raises(ValueError, match=says):
        TokenFiles(paths=(str(path),)).build()


def test_a_large_id_is_not_counted_up_to(tmp_path):
    np.array([1, 4_000_000_000] * 50, dtype="uint32").tofile(tmp_path / "ids.bin")
    with pytest.raises(ValueError, match=r"without a tokenizer ids are below 1048576\. Are they uint32"):
        TokenFiles(paths=(str(tmp_path / "ids.bin"),), dtype="uint32").build()


def test_what_is_held_out_says_something(tmp_path):
    words = tokenizers.Tokenizer(models.WordLevel({"a": 0, "<|endoftext|>": 1}, unk_token="a"))
    words.add_special_tokens(["<|endoftext|>"])
    words.save(str(tmp_path / "tokenizer.json"))
    np.save(tmp_path / "ids.npy", np.array([0] * 90 + [1] * 10))
    with pytest.raises(ValueError, match=r"the last 5 ids .* stand for no text at all"):
        TokenFiles(paths=(str(tmp_path / "ids.npy"),)).build()


def test_files_of_two_kinds(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(50, dtype="uint64"))
    np.save(tmp_path / "b.npy", np.arange(50, dtype="int64"))
    corpus = TokenFiles(paths=(str(tmp_path / "a.npy"), str(tmp_path / "b.npy")), held_out=0.6).build()
    assert corpus.held_out.read(0, 60).tolist() == [*range(40, 50), *range(50)]


def test_ids_beyond_the_tokenizer(tmp_path):
    ByteTokenizer().save(tmp_path)
    np.save(tmp_path / "ids.npy", np.array([1, 500]))
    with pytest.raises(ValueError, match="hold the id 500, but the tokenizer knows ids below 259"):
        TokenFiles(paths=(str(tmp_path / "ids.npy"),)).build()
