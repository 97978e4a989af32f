import pytest
import torch
from transformers import BertTokenizer

from pipeline.errors import DataError
from pipeline.text import CaptionTokenizer, build_vocabulary, clean_caption


@pytest.fixture
def vocab_path(tmp_path):
    path = tmp_path / "vocab.txt"
    vocabulary = build_vocabulary(["#C C picks up a cup", "#C C puts down a cup"])
    path.write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("#C C picks up a cup.", "picks up a cup"),
        ("#c c opens the red-lid/box #unsure", "opens the red lid box"),
        ("#O man X waves", "man x waves"),
        ("C's  (left) hand; *moves*!", "cs left hand moves"),
        ("#Unsure", ""),
        ("washes a #2 pan", "washes a 2 pan"),
    ],
)
def test_captions_lose_tags_and_punctuation_and_case(raw, clean):
    assert clean_caption(raw) == clean


def test_the_vocabulary_starts_with_special_tokens_and_ends_with_words_by_frequency():
    vocabulary = build_vocabulary(["cup cup pan", "pan cup jar"])
    assert vocabulary[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert vocabulary[-3:] == ["cup", "pan", "jar"]
    assert len(set(vocabulary)) == len(vocabulary)


def test_the_vocabulary_does_not_depend_on_the_order_of_captions():
    captions = ["picks up a cup", "puts down a pan", "opens a jar"]
    assert build_vocabulary(captions) == build_vocabulary(captions[::-1])


def test_a_vocabulary_too_small_for_the_characters_is_refused():
    with pytest.raises(DataError, match="at most 20 tokens"):
        build_vocabulary(["a cup"], max_size=20)


def test_tokens_are_cls_words_padding_without_sep(vocab_path):
    tokens = vocab_path.read_text(encoding="utf-8").split("\n")
    ids_BL, mask_BL = CaptionTokenizer(vocab_path, 8)(["#C C picks up a cup."])
    assert [tokens[i] for i in ids_BL[0]] == ["[CLS]", "picks", "up", "a", "cup", "[PAD]", "[PAD]", "[PAD]"]
    assert mask_BL.tolist() == [[True] * 5 + [False] * 3]
    assert ids_BL.dtype == torch.int64
    assert mask_BL.dtype == torch.bool


def test_unseen_words_are_spelled_and_never_unknown(vocab_path):
    tokenizer = CaptionTokenizer(vocab_path, 32)
    ids_BL, _mask = tokenizer(["zebra & quokka 42"])
    assert tokenizer.unk_id not in ids_BL[0].tolist()


def test_long_captions_are_cut_at_the_end_and_counted(vocab_path):
    tokenizer = CaptionTokenizer(vocab_path, 3)
    ids_BL, mask_BL = tokenizer(["picks up a cup", "cup"])
    assert ids_BL.shape == (2, 3)
    assert mask_BL.tolist() == [[True, True, True], [True, True, False]]
    assert tokenizer.num_truncated == 1


def test_transformers_reads_the_same_vocabulary_file(vocab_path):
    ours, _mask = CaptionTokenizer(vocab_path, 16)(["puts down a teacup"])
    theirs = BertTokenizer(vocab=str(vocab_path), do_lower_case=True)
    expected = theirs.convert_tokens_to_ids(theirs.tokenize("puts down a teacup"))
    assert ours[0, 1 : 1 + len(expected)].tolist() == expected


def test_a_vocabulary_without_cls_is_refused(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("[PAD]\n[UNK]\n[MASK]\na\n")
    with pytest.raises(DataError, match=r"\[CLS\] missing"):
        CaptionTokenizer(path, 8)
