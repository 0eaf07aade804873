"""Tables of images and prompts that users wrote by hand or with other programs."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffpref.errors import UserError
from diffpref.image_tables import open_images


def _lists(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for name in "ab":
        Image.new("RGB", (8, 8)).save(folder / f"{name}.png")
    return folder


def test_a_line_of_more_cells_than_columns_is_refused_and_no_prompt_loses_its_end(tmp_path: Path) -> None:
    path = _lists(tmp_path) / "list.csv"
    path.write_text("file,prompt\na.png,a cat,\nb.png,a cat, on a mat\n")
    with pytest.raises(UserError, match="line 3 has more cells"):
        open_images(path)
    path.write_text('file,prompt\na.png,a cat,\nb.png,"a cat, on a mat"\n')
    assert [row.prompt for row in open_images(path)] == ["a cat", "a cat, on a mat"]


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ('"prompt_id": 1', '"seed": 1', "row 1 has no prompt_id"),
        ('"prompt_id": 1.5', '"prompt_id": 1', "must be a whole number, not 1.5"),
        ('"prompt_id": 99999999999999999999', '"prompt_id": 1', "must be a whole number, not 9999"),
        ('"seed": Infinity', '"seed": 1', "must be a whole number, not inf"),
        ('"kind": "\\ud800"', '"seed": 1', "line 1: 'utf-8' codec can't encode"),
    ],
)
def test_numbers_and_texts_that_cannot_be_kept_are_refused(
    tmp_path: Path, first: str, second: str, said: str
) -> None:
    path = _lists(tmp_path) / "list.jsonl"
    entries = (
        f'{{"file": "{n}.png", "prompt": "{n}", {more}}}'
        for n, more in zip("ab", (first, second), strict=True)
    )
    path.write_text("\n".join(entries))
    with pytest.raises(UserError) as error:
        open_images(path)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"image": ["a.png", "b.png"], "prompt": [1, 2]}, "holds int64, which is no prompt"),
        ({"image": ["a.png", "b.png"], "prompt": [b"x", b"y"]}, "holds binary, which is no prompt"),
        ({"image": ["a.png", "b.png"], "prompt": [["x"], ["y"]]}, "which is no prompt"),
        ({"image": [1, 2], "prompt": ["x", "y"]}, "holds int64, which is no image"),
        (
            {"image": ["a.png", "b.png"], "prompt": ["x", "y"], "prompt_id": [1, None]},
            "row 1 has no prompt_id",
        ),
    ],
)
def test_parquet_columns_of_another_kind_are_refused(tmp_path: Path, columns: dict, said: str) -> None:
    path = _lists(tmp_path) / "list.parquet"
    pq.write_table(pa.table(columns), path)
    with pytest.raises(UserError) as error:
        open_images(path)
    assert said in str(error.value)


def test_parquet_files_may_store_their_texts_in_different_types(tmp_path: Path) -> None:
    types = {"1": pa.string(), "2": pa.large_string(), "3": pa.null()}
    for name, kind in types.items():
        texts = pa.nulls(2) if pa.types.is_null(kind) else pa.array(["x", name], kind)
        ids = pa.array([1, int(name)], pa.int32() if name == "1" else pa.int64())
        pq.write_table(
            pa.table({"image": ["a.png"] * 2, "prompt": texts, "prompt_id": ids}),
            tmp_path / f"{name}.parquet",
        )
    rows = open_images(tmp_path, prompts=False)
    assert [row.prompt for row in rows] == ["x", "1", "x", "2", "", ""]
    assert [row.prompt_id for row in rows] == [1, 1, 1, 2, 1, 3]
