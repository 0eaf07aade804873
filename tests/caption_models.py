"""Tiny models of the real classes with random weights, saved as folders: what captioners load."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tests.caption_inputs import PROMPTS

CHAT = (
    "{% for m in messages %}{{ '<s>' }}{{ m['role'] }}: "
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}\n{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
PICTURE = {"height": 32, "width": 32}


def bpe_tokenizer(extra: tuple[str, ...] = ()) -> transformers.PreTrainedTokenizerFast:
    """Byte-level, of 600 tokens, with <s>, </s>, <pad> and `extra` as special ones."""
    special = ["<pad>", "<s>", "</s>", *extra]
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet)
    inner.train([str(PROMPTS)], trainer)
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=list(extra), model_max_length=2048,
    )  # fmt: skip


def small_llama(vocabulary: int) -> transformers.LlamaConfig:
    """Weights wide enough for answers to depend on what is asked."""
    return transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=2048, initializer_range=0.4,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def clip_vision() -> transformers.CLIPVisionConfig:
    return transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=32,
        patch_size=8, initializer_range=0.4,
    )  # fmt: skip


def save_llava(folder: Path) -> Path:
    tokenizer = bpe_tokenizer(("<image>",))
    image = tokenizer.convert_tokens_to_ids("<image>")
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config=clip_vision(), text_config=small_llama(len(tokenizer)), image_token_index=image,
        vision_feature_layer=-2, image_seq_length=16,
    )  # fmt: skip
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    transformers.LlavaProcessor(
        transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=PICTURE),
        tokenizer, patch_size=8, vision_feature_select_strategy="default", chat_template=CHAT,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def save_blip(folder: Path) -> Path:
    words = PROMPTS.read_text(encoding="utf-8").lower()
    letters = sorted(set(words) - {" ", "\n"})
    common = [word for word, _ in Counter(words.split()).most_common(300) if word.isalpha()]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{x}" for x in letters), *common]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = transformers.BertTokenizerFast(vocab=vocabulary)
    tokenizer.add_tokens(["[DEC]"], special_tokens=True)
    torch.manual_seed(0)
    text = transformers.BlipTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, encoder_hidden_size=32, intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=256, initializer_range=0.4,
        bos_token_id=len(tokenizer) - 1, pad_token_id=0, eos_token_id=3, sep_token_id=3,
    )  # fmt: skip
    vision = transformers.BlipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32,
        patch_size=8, initializer_range=0.4,
    )  # fmt: skip
    config = transformers.BlipConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=32
    )
    transformers.BlipForConditionalGeneration(config).save_pretrained(folder)
    images = transformers.BlipImageProcessorPil(size=PICTURE)
    transformers.BlipProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def t5_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Pieces as T5 has them: frequent words, then single letters; each text ended by </s>."""
    text = PROMPTS.read_text(encoding="utf-8")
    words = [f"▁{word}" for word, _ in Counter(text.split()).most_common(300)]
    pieces = ["<pad>", "</s>", "<unk>", "▁", *dict.fromkeys(words), *sorted(set(text) - set(" \n▁"))]
    inner = Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=2))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def save_t5(folder: Path) -> Path:
    tokenizer = t5_tokenizer()
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu", tie_word_embeddings=True, initializer_factor=2.0,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_florence(folder: Path) -> Path:
    """Florence-2: an encoder-decoder that begins its answers with the end token."""
    inner = bpe_tokenizer(("<image>",)).backend_tokenizer
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    torch.manual_seed(0)
    text = transformers.BartConfig(
        vocab_size=len(tokenizer), d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=64,
        decoder_ffn_dim=64, encoder_attention_heads=2, decoder_attention_heads=2, init_std=0.4,
        max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2,
    )  # fmt: skip
    vision = transformers.Florence2VisionConfig(
        depths=(1, 1, 1, 1), embed_dim=(8, 8, 16, 16), num_heads=(1, 1, 2, 2), num_groups=(1, 1, 2, 2),
        window_size=4, projection_dim=32, initializer_range=0.4,
    )  # fmt: skip
    image = tokenizer.convert_tokens_to_ids("<image>")
    config = transformers.Florence2Config(
        text_config=text.to_dict(), vision_config=vision.to_dict(), image_token_id=image
    )
    transformers.Florence2ForConditionalGeneration(config).save_pretrained(folder)
    images = transformers.CLIPImageProcessorPil(size={"height": 64, "width": 64}, do_center_crop=False)
    images.image_seq_length = 5
    transformers.Florence2Processor(images, tokenizer).save_pretrained(folder)
    return folder


def save_llama(folder: Path) -> Path:
    tokenizer = bpe_tokenizer()
    tokenizer.chat_template = CHAT
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(small_llama(len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
