"""What an image-text-to-text model of transformers reads: images, and questions in its own chat format."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from diffpref.errors import UserError
from diffpref.language_models import loading

if TYPE_CHECKING:
    from PIL.Image import Image

_UNPADDED = ("blip", "git")  # their positions count padding, so batches are of texts of one length


class ImageTextModel(NamedTuple):
    """A model whose configuration is read, and its other parts where they are asked for."""

    source: loading.Source

    @property
    def kind(self) -> str:
        """The model type of its configuration, such as "llava"."""
        return str(self.source.config.model_type)

    @property
    def unpadded(self) -> bool:
        """Whether rows of a batch must have texts of one length."""
        return self.kind in _UNPADDED

    @property
    def processor(self) -> Any:
        processor = loading.load_processor("AutoProcessor", self.source.place, self.source.commit)
        # learned positions of encoders count from the left
        processor.tokenizer.padding_side = "right" if self.source.config.is_encoder_decoder else "left"
        return processor

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    @property
    def chat(self) -> bool:
        return bool(self.processor.chat_template)

    def network(self, device: str, dtype: str) -> Any:
        """The network for inference. Raises UserError where it cannot be had."""
        return loading.load_network(*self._parts, device, dtype)

    def shared_network(self, device: str, dtype: str) -> Any:
        """`network`, loaded once a process."""
        return loading.shared_network(*self._parts, device, dtype)

    @property
    def _parts(self) -> tuple[str, str, str | None]:
        return "AutoModelForImageTextToText", self.source.place, self.source.commit

    def asked(self, text: str) -> str:
        """A question about an image as the model's chat template wants it."""
        if not self.chat:
            return text
        content = [{"type": "image"}, {"type": "text", "text": text}]
        turn = [{"role": "user", "content": content}]
        return str(self.processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False))

    def inputs(self, images: Sequence[Image], asked: Sequence[str], network: Any) -> dict[str, Any]:
        """What the network reads of images and what is asked about each, on the CPU, padded."""
        pictures: Any = [[image.convert("RGB")] for image in images] if self.chat else list(images)
        bos = self.tokenizer.bos_token
        # many chat templates write the first token themselves
        once = {"add_special_tokens": False} if self.chat and bos and asked[0].startswith(bos) else {}
        made = self.processor(text=list(asked), images=pictures, padding=True, return_tensors="pt", **once)
        known = inspect.signature(network.forward).parameters
        # a few make token types in vain
        return {name: value for name, value in made.items() if name != "token_type_ids" or name in known}


def find_image_text_model(spec: str, revision: str = "") -> ImageTextModel:
    """The model of a folder or hub id, its weights not loaded yet.

    Raises:
        UserError: there is none, or it is of another kind, or only code of its own could run it.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as KNOWN

    source = loading.find_source(spec, revision)
    if source.config.model_type not in KNOWN:
        raise UserError(
            f"{spec} is no image-text-to-text model of transformers",
            why=f"its type is {source.config.model_type!r}",
            fix="give a LLaVA, Qwen-VL, BLIP, Florence-2 or other model of that kind",
        )
    return ImageTextModel(source)
