"""Folders of dual captions as `diffpref caption` leaves them, from the shipped pairs, without the command."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from diffpref.captions import RulePerturber
from diffpref.paths import TINY_ASSETS
from diffpref.tiny.oracle import judge

PAIRS = TINY_ASSETS / "pairs" / "train.parquet"
MAKER = {"backend": pa.string(), "model": pa.string(), "revision": pa.string(), "template": pa.string()}
ORIGIN = pa.struct(
    {
        "source": pa.string(),
        "captioner": pa.struct({**MAKER, "seed": pa.int64()}),
        "perturber": pa.struct({**MAKER, "level": pa.string(), "seed": pa.int64()}),
        "changed": pa.bool_(),
        "before": pa.string(),
    }
)
SCHEMA = pa.schema(
    {
        "caption": pa.string(), "jpg_0": pa.binary(), "jpg_1": pa.binary(), "label_0": pa.float32(),
        **{f"{name}_{side}": kind for side in (0, 1) for name, kind in
           (("caption", pa.string()), ("tokens", pa.int32()), ("origin", ORIGIN))},
    }
)  # fmt: skip


def tiny_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(TINY_ASSETS / "model" / "tokenizer")


def tiny_rows(method: str, count: int, level: str = "medium", seed: int = 0) -> list[dict[str, Any]]:
    """The first shipped pairs, captioned by the oracle and perturbed by rules."""
    wanted = ["caption", "jpg_0", "jpg_1", "label_0"]
    batch = next(pq.ParquetFile(PAIRS).iter_batches(count, columns=wanted))
    perturb = RulePerturber(level=level, seed=seed)  # type: ignore[arg-type]
    return [_dual(row, number, method, perturb) for number, row in enumerate(batch.to_pylist())]


def _dual(row: dict[str, Any], number: int, method: str, perturb: RulePerturber) -> dict[str, Any]:
    loser = {1.0: 1, 0.0: 0}.get(row["label_0"])
    captioner = {"backend": "oracle", "model": "", "revision": "1", "template": "", "seed": 0}
    perturber = {"backend": "rules", "model": "", "revision": "1", "template": "", "seed": perturb.seed}
    for side in (0, 1):
        if method == "perturbation":
            text, source = row["caption"], "prompt"
        else:
            text = judge(Image.open(io.BytesIO(row[f"jpg_{side}"])), row["caption"]).caption
            source = "captioner"
        origin = {"source": source, "captioner": captioner if source == "captioner" else None,
                  "perturber": None, "changed": True, "before": None}  # fmt: skip
        if method != "captioning" and side == loser:
            result = perturb([text], [number])[0]
            origin |= {"perturber": {**perturber, "level": perturb.level}, "changed": result.changed}
            origin |= {"source": "perturber" if source == "prompt" else "captioner+perturber"}
            origin |= {"before": text} if source == "captioner" else {}
            text = result.text
        row |= {f"caption_{side}": text, f"origin_{side}": origin}
    return row


def write_captions(folder: Path, rows: list[dict[str, Any]], per_part: int = 40, tokens: bool = True) -> Path:
    """Parts with their tallies, settings.json. Rows may lack origins or tokens (null then)."""
    folder.mkdir(parents=True)
    tokenizer = tiny_tokenizer() if tokens else None
    for row in rows:
        for side in (0, 1):
            if tokenizer is not None:
                row.setdefault(f"tokens_{side}", len(tokenizer(row[f"caption_{side}"]).input_ids))
    for number, first in enumerate(range(0, len(rows), per_part)):
        part = rows[first : first + per_part]
        bad = [[f"pairs.parquet row {first}", "empty_answer", "the model said <nothing>"]]
        tally = {"read": len(part) + 1, "kept": len(part), "dropped": {"empty_answer": 1}, "bad": bad}
        table = pa.Table.from_pylist(part, SCHEMA).replace_schema_metadata({"diffpref": json.dumps(tally)})
        pq.write_table(table, folder / f"part-{number:05d}.parquet", row_group_size=16)
    settings = {"pairs": "tiny:pairs/train.parquet", "tokenizer": "tiny:model", "limit": 90, "replace": True}
    (folder / "settings.json").write_text(json.dumps(settings))
    return folder


def tiny_clip(folder: Path) -> Path:
    """A random CLIPModel of the real class with the shipped model's tokenizer."""
    import torch
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    tokenizer = tiny_tokenizer()
    network = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    words = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = CLIPConfig(
        text_config={**network, **words, "vocab_size": len(tokenizer), "max_position_embeddings": 77},
        vision_config={**network, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    return folder
