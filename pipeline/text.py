"""Captions to token ids: cleaning, a word-level WordPiece vocabulary, and the tokenizer.

The vocabulary file is BERT's vocab.txt (one token a line, line number = id), so the file of a local BERT
folder works in place of one made here. Left out on purpose: downloading anything.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from string import ascii_lowercase, digits, punctuation

import numpy as np
import torch
from jaxtyping import Bool, Int64
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer, Replace
from tokenizers.normalizers import Sequence as NormalizerSequence
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from pipeline.errors import DataError
from pipeline.storage import StoragePath, storage_path

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_WEARER_TAG = re.compile(r"#\s*C\s+C\b", re.IGNORECASE)
_OTHER_TAG = re.compile(r"#\s*(?:unsure|[a-z])\b", re.IGNORECASE)
_DELETED = re.compile(r"[,.'!?\"()*#:;~]")
_SPACED = re.compile(r"[-/]")


def clean_caption(text: str) -> str:
    """Lower-case a narration and strip its tags and punctuation.

    `#C C picks up a cup.` becomes `picks up a cup`: the camera wearer acts in nearly every caption, so naming
    them carries nothing. `#O man X waves` keeps its subject: `man x waves`. `#unsure` goes. `, . ' ! ? " ( )
    * # : ; ~` are deleted, `-` and `/` become spaces and runs of spaces collapse (the caption rule of SViTT's
    own data code).
    """
    text = _OTHER_TAG.sub(" ", _WEARER_TAG.sub(" ", text))
    text = _SPACED.sub(" ", _DELETED.sub("", text))
    return " ".join(text.split()).lower()


def _words(tokenizer_free_text: str) -> list[str]:
    normalized = BertNormalizer(lowercase=True).normalize_str(tokenizer_free_text)
    return [word for word, _span in BertPreTokenizer().pre_tokenize_str(normalized)]


def build_vocabulary(captions: Iterable[str], max_size: int = 30522) -> list[str]:
    """Tokens for a WordPiece vocabulary: special tokens, single characters, then words by falling frequency.

    Every character of the captions, all ASCII letters, digits and punctuation stand alone and as `##`
    continuation, so an unseen word is spelled instead of becoming [UNK]. Equal frequencies are ordered
    alphabetically: the result depends on the multiset of captions only. Raises DataError when `max_size`
    (BERT's by default) is too small for the characters.
    """
    counts: Counter[str] = Counter()
    for caption in captions:
        counts.update(_words(clean_caption(caption)))
    characters = set(ascii_lowercase) | set(digits) | set(punctuation)
    for word in counts:
        characters.update(word)
    singles = sorted(characters)
    vocabulary = [*SPECIAL_TOKENS, *singles, *(f"##{character}" for character in singles)]
    if len(vocabulary) > max_size:
        raise DataError(
            f"built a vocabulary of at most {max_size} tokens, but {len(vocabulary)} are needed for special "
            "tokens and single characters alone; allow more tokens or check the captions' language"
        )
    ranked = sorted((word for word in counts if len(word) > 1), key=lambda word: (-counts[word], word))
    return vocabulary + ranked[: max_size - len(vocabulary)]


class CaptionTokenizer:
    """Cleans and tokenises captions as `[CLS] w1 w2 ... [PAD]`, without [SEP], padded to `max_length`.

    Longer captions are cut at the end; `num_truncated` counts them, so that nothing is lost without a number.
    """

    def __init__(self, vocab_path: str | StoragePath, max_length: int) -> None:
        tokens = _read_vocabulary(storage_path(vocab_path))
        if max_length < 2:
            raise DataError(f"max_length is {max_length}; expected at least 2: [CLS] and one word")
        self.max_length = max_length
        self.vocab_size = len(tokens)
        self.pad_id, self.cls_id, self.mask_id = (tokens[name] for name in ("[PAD]", "[CLS]", "[MASK]"))
        self.unk_id = tokens["[UNK]"]
        self.num_truncated = 0
        self._tokenizer = Tokenizer(WordPiece(tokens, unk_token="[UNK]", max_input_chars_per_word=100))
        self._tokenizer.normalizer = BertNormalizer(lowercase=True)
        self._tokenizer.pre_tokenizer = BertPreTokenizer()
        self._tokenizer.post_processor = TemplateProcessing(
            single="[CLS] $A", special_tokens=[("[CLS]", self.cls_id)]
        )

    def __call__(self, captions: Sequence[str]) -> tuple[Int64[Tensor, "B L"], Bool[Tensor, "B L"]]:
        """Returns (ids_BL, mask_BL); the mask is True on [CLS] and words, False on padding."""
        ids_BL = np.full((len(captions), self.max_length), self.pad_id, dtype=np.int64)
        mask_BL = np.zeros((len(captions), self.max_length), dtype=np.bool_)
        for row, caption in enumerate(captions):
            ids = self._tokenizer.encode(clean_caption(caption)).ids
            self.num_truncated += len(ids) > self.max_length
            kept = ids[: self.max_length]
            ids_BL[row, : len(kept)] = kept
            mask_BL[row, : len(kept)] = True
        return torch.from_numpy(ids_BL), torch.from_numpy(mask_BL)

    def with_cleaning(self) -> Tokenizer:
        """A tokenizer that cleans captions by itself, to be saved for programs without `clean_caption`. It neither pads
        nor cuts.
        """
        tokenizer = Tokenizer.from_str(self._tokenizer.to_str())
        replaced = [(f"(?i){_WEARER_TAG.pattern}", " "), (f"(?i){_OTHER_TAG.pattern}", " ")]
        replaced += [(_DELETED.pattern, ""), (_SPACED.pattern, " ")]
        steps = [Replace(Regex(pattern), content) for pattern, content in replaced]
        tokenizer.normalizer = NormalizerSequence([*steps, BertNormalizer(lowercase=True)])
        return tokenizer


def _read_vocabulary(path: StoragePath) -> dict[str, int]:
    if not path.is_file():
        raise DataError(
            f"read the vocabulary {path}: no such file; expected BERT's vocab.txt or the one prepare writes"
        )
    lines = path.read_text(encoding="utf-8").split("\n")
    if lines and lines[-1] == "":
        lines.pop()
    tokens = {token.rstrip("\r"): position for position, token in enumerate(lines)}
    if len(tokens) != len(lines):
        raise DataError(
            f"read the vocabulary {path}: {len(lines) - len(tokens)} tokens stand twice; "
            "expected one line each"
        )
    missing = [name for name in ("[PAD]", "[UNK]", "[CLS]", "[MASK]") if name not in tokens]
    if missing:
        raise DataError(
            f"read the vocabulary {path}: {', '.join(missing)} missing; "
            "expected a BERT vocab.txt with one token a line"
        )
    return tokens
