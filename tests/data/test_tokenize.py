from __future__ import annotations

import errno
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedtune.data.tokenize import tokenize
from fedtune.errors import DataError
from tests.data.conftest import WordTokenizer, make_corpus
from tests.support.golden import Golden


def cache_file(home: Path) -> Path:
    (file,) = (home / "cache" / "tokens").iterdir()
    return file


def test_tokens_are_those_of_the_tokenizer(home: Path, tokenizer: WordTokenizer) -> None:
    corpus = make_corpus(people=8, sites=2)
    tokens = tokenize(corpus, tokenizer, "words", 64)
    expected = tokenizer(list(corpus.texts), None, max_length=64)["input_ids"]
    assert [tokens.tokens(i).tolist() for i in range(tokens.num_records)] == expected
    assert tokens.input_ids.dtype == np.int32
    assert tokens.pad_id == 7
    assert tokens.fingerprint == corpus.fingerprint()
    np.testing.assert_array_equal(tokens.units, corpus.units)


def test_max_length_cuts(home: Path, tokenizer: WordTokenizer) -> None:
    assert tokenize(make_corpus(), tokenizer, "words", 8).lengths.max() == 8


def test_pairs_are_tokenised_together(home: Path, tokenizer: WordTokenizer) -> None:
    corpus = replace(make_corpus(), pairs=("second one",) * 40)
    tokens = tokenize(corpus, tokenizer, "words", 64)
    assert tokens.tokens(0)[-4:].tolist() == [2, 16, 13, 2]


def test_second_time_is_from_the_cache_and_memory_mapped(home: Path, tokenizer: WordTokenizer) -> None:
    corpus = make_corpus()
    first = tokenize(corpus, tokenizer, "words", 64)
    calls = tokenizer.calls
    second = tokenize(corpus, tokenizer, "words", 64)
    assert tokenizer.calls == calls
    np.testing.assert_array_equal(first.input_ids, second.input_ids)
    np.testing.assert_array_equal(first.offsets, second.offsets)
    for tokens in (first, second):
        assert isinstance(tokens.input_ids.base, np.memmap) or isinstance(tokens.input_ids, np.memmap)


def test_equal_content_in_another_order_is_not_mistaken(home: Path, tokenizer: WordTokenizer) -> None:
    corpus = make_corpus()
    order = np.random.default_rng(0).permutation(corpus.num_records)
    tokenize(corpus, tokenizer, "words", 64)
    shuffled = tokenize(corpus.subset(order), tokenizer, "words", 64)
    straight = tokenize(corpus, tokenizer, "words", 64)
    for i, row in enumerate(order):
        np.testing.assert_array_equal(shuffled.tokens(i), straight.tokens(int(row)))


def test_tokenizer_and_length_are_part_of_the_key(home: Path, tokenizer: WordTokenizer) -> None:
    corpus = make_corpus()
    for name, length in (("words", 64), ("other", 64), ("words", 16)):
        before = tokenizer.calls
        tokenize(corpus, tokenizer, name, length)
        assert tokenizer.calls == before + 1


@pytest.mark.parametrize("damage", ["truncate", "flip", "foreign", "empty", "other corpus"])
def test_a_corrupt_cache_is_rebuilt_and_said(home: Path, tokenizer: WordTokenizer, damage: str) -> None:
    corpus = make_corpus()
    good = tokenize(corpus, tokenizer, "words", 64).input_ids.tolist()
    file = cache_file(home)
    content = bytearray(file.read_bytes())
    if damage == "truncate":
        del content[-40:]
    elif damage == "flip":
        content[-5] ^= 255
    elif damage == "foreign":
        content = bytearray(b"something else entirely")
    elif damage == "empty":
        content = bytearray()
    else:
        # The file of the other corpus under this one's name.
        tokenize(make_corpus(num_records=30, seed=3), tokenizer, "words", 64)
        (other,) = [path for path in file.parent.iterdir() if path != file]
        content = bytearray(other.read_bytes())
    file.write_bytes(content)
    with pytest.warns(UserWarning, match="unusable .* built anew"):
        rebuilt = tokenize(corpus, tokenizer, "words", 64)
    assert rebuilt.input_ids.tolist() == good
    calls = tokenizer.calls
    assert tokenize(corpus, tokenizer, "words", 64).input_ids.tolist() == good
    assert tokenizer.calls == calls


def test_a_full_disk_is_said_and_the_run_goes_on(
    home: Path, tokenizer: WordTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fedtune.config.files.os.fsync", full)
    with pytest.warns(UserWarning, match="cannot be written .*No space left"):
        tokens = tokenize(make_corpus(), tokenizer, "words", 64)
    assert tokens.num_records == 40
    assert list((home / "cache" / "tokens").iterdir()) == []


def test_a_cache_folder_that_cannot_be_made_is_said(home: Path, tokenizer: WordTokenizer) -> None:
    (home / "cache").mkdir(parents=True)
    (home / "cache" / "tokens").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="cannot be written"):
        assert tokenize(make_corpus(), tokenizer, "words", 64).num_records == 40


def test_cached_tokens_are_for_their_owner_only(home: Path, tokenizer: WordTokenizer) -> None:
    tokenize(make_corpus(), tokenizer, "words", 64)
    assert cache_file(home).stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("max_length", [2, 513])
def test_a_length_that_the_encoder_cannot_take_is_refused(
    home: Path, tokenizer: WordTokenizer, max_length: int, golden: Golden
) -> None:
    with pytest.raises(DataError) as raised:
        tokenize(make_corpus(), tokenizer, "words", max_length)
    golden(raised)


@pytest.mark.slow
def test_several_processes_may_tokenise_at_once(home: Path) -> None:
    code = (
        "from tests.data.conftest import WordTokenizer, make_corpus\n"
        "from fedtune.data.tokenize import tokenize\n"
        "import warnings; warnings.simplefilter('error')\n"
        "for seed in range(6):\n"
        "    t = tokenize(make_corpus(num_records=400, seed=seed), WordTokenizer(), 'words', 64)\n"
        "    print(int(t.input_ids.sum()), t.num_records)\n"
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    outputs = [process.communicate(timeout=60) for process in running]
    assert [process.returncode for process in running] == [0] * 4, outputs[0][1]
    assert len({out for out, _ in outputs}) == 1
    # No half-written file is left beside the six.
    assert len(list((home / "cache" / "tokens").iterdir())) == 6


def test_a_real_fast_tokenizer_fits(home: Path, tmp_path: Path) -> None:
    from transformers import BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "record", "word", *"0123456789"]
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(words))
    tokenizer = BertTokenizerFast.from_pretrained(_saved(tmp_path, words))
    tokens = tokenize(make_corpus(), tokenizer, "bert", 16)
    assert tokens.tokens(1)[:4].tolist() == [2, 5, 8, 6] or tokens.tokens(1)[:3].tolist() == [2, 5, 8]
    assert tokens.lengths.max() <= 16
    assert tokens.pad_id == 0


def _saved(folder: Path, words: list[str]) -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    fast.save_pretrained(folder)
    return str(folder)


def test_a_part_takes_its_tokens_from_the_whole(home: Path, tokenizer: WordTokenizer) -> None:
    whole = make_corpus()
    tokenize(whole, tokenizer, "words", 64)
    calls = tokenizer.calls
    rows = np.random.default_rng(0).permutation(whole.num_records)[:17]
    part = whole.subset(whole.subset(np.arange(3, whole.num_records)).part_of[1][:20])  # type: ignore[index]
    for one in (whole.subset(rows), part):
        taken = tokenize(one, tokenizer, "words", 64)
        assert tokenizer.calls == calls
        alone = replace(one, part_of=None)
        np.testing.assert_array_equal(one.digests, alone.digests)
        expected = tokenizer(list(one.texts), None, max_length=64)["input_ids"]
        calls = tokenizer.calls
        assert [taken.tokens(i).tolist() for i in range(taken.num_records)] == expected
