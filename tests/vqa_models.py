"""Tiny vision-language models of the real classes whose vocabularies have Yes and No."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from tokenizers import AddedToken

from tests.caption_models import bpe_tokenizer, save_llava, t5_tokenizer

VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def write_llava(folder: Path, seed: int = 0) -> Path:
    """A LLaVA. seed: other than 0, other weights."""
    return with_answers(save_llava, folder, seed=seed)


def with_answers(
    save: Callable[[Path], Path], folder: Path, words: tuple[str, ...] = ("Yes", "No"), seed: int = 0
) -> Path:
    """A model of tests/caption_models.py with more words, each one token."""
    save(folder)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    processor.tokenizer.add_tokens([AddedToken(word, normalized=False) for word in words])
    processor.save_pretrained(folder)
    network = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    torch.manual_seed(1)
    network.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
    with torch.no_grad():
        for weight in network.parameters():
            weight.mul_(1 + seed / 10)
    network.save_pretrained(folder)
    return folder


def save_instructblip(folder: Path) -> Path:
    """InstructBLIP with T5: an encoder-decoder, and a query transformer with a tokenizer of its own."""
    tokenizer = t5_tokenizer()
    tokenizer.add_tokens([AddedToken("<image>", special=True)])
    torch.manual_seed(0)
    text = transformers.T5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, initializer_factor=0.5,
        tie_word_embeddings=False,
    )  # fmt: skip
    queries = transformers.InstructBlipQFormerConfig(
        **VISION, vocab_size=600, encoder_hidden_size=32, max_position_embeddings=256, initializer_range=0.4
    )
    vision = transformers.InstructBlipVisionConfig(
        **VISION, image_size=32, patch_size=8, initializer_range=0.4
    )
    config = transformers.InstructBlipConfig(
        vision_config=vision.to_dict(), qformer_config=queries.to_dict(), text_config=text.to_dict(),
        num_query_tokens=4, image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    transformers.InstructBlipForConditionalGeneration(config).save_pretrained(folder)
    pictures = transformers.BlipImageProcessorPil(size={"height": 32, "width": 32})
    transformers.InstructBlipProcessor(
        pictures, tokenizer, bpe_tokenizer(), num_query_tokens=4
    ).save_pretrained(folder)
    return folder
