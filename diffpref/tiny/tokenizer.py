"""A CLIP tokenizer with a small vocabulary of its own: byte-level BPE over the world's and generic words."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

from tokenizers import Regex, Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTokenizer

MERGES = 1500
MAX_LENGTH = 77
START, END = "<|startoftext|>", "<|endoftext|>"
_CLIP_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def _byte_characters() -> list[str]:
    """The printable stand-ins for the 256 bytes, in CLIP's order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + k) for k in range(len(rest))]


def _merges() -> list[tuple[str, str]]:
    """Merges learned from the word list, the world's own words (its first lines) counted most."""
    lines = (files("diffpref.tiny") / "words.txt").read_text().splitlines()
    corpus = [
        word for rank, line in enumerate(lines) for word in line.split() for _ in range(40 if rank < 3 else 4)
    ]
    tokenizer = Tokenizer(BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = Lowercase()
    tokenizer.pre_tokenizer = Sequence(
        [
            Split(Regex(_CLIP_SPLIT), "removed", invert=True),
            ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    characters = _byte_characters()
    trainer = BpeTrainer(
        vocab_size=512 + MERGES,
        initial_alphabet=characters,
        end_of_word_suffix="</w>",
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [tuple(pair) for pair in merges]


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """Writes the tokenizer's files to `folder` and loads them back. Any text tokenises down to bytes."""
    characters, merges = _byte_characters(), _merges()
    words = [*characters, *(c + "</w>" for c in characters), *("".join(pair) for pair in merges), START, END]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(words))}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    tokenizer = CLIPTokenizer(
        vocab=vocabulary,
        merges=merges,  # type: ignore[arg-type]
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=END,
        model_max_length=MAX_LENGTH,
    )
    tokenizer.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)
