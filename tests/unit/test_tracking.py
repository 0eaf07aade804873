"""metrics.jsonl as a resumed run finds it."""

from __future__ import annotations

import pytest

from diffpref.training.tracking import Metrics

ROWS = [b'{"step": 1, "loss": 0.5}\n', b'{"step": 2, "loss": 0.25}\n', b'{"step": 3, "loss": 0.125}\n']


@pytest.mark.parametrize(
    "line",
    [b"\xff\xfe\x80\n", b"7\n", b"[]\n", b"null\n", b'{"loss": 1}\n', b'{"step": "2"}\n', b'{"step": true}\n',
     b"[" * 100_000 + b"\n", b"\0" * 512 + b"\n", b"\n"],
    ids=["no UTF-8", "number", "list", "null", "no step", "step of text", "step of truth", "nested", "zeros",
         "empty"],
)  # fmt: skip
@pytest.mark.parametrize("place", [0, 1, 3])
def test_a_damaged_line_costs_no_other_and_stays_in_a_copy(tmp_path, caplog, line, place):
    path = tmp_path / "metrics.jsonl"
    before = b"".join([*ROWS[:place], line, *ROWS[place:]])
    path.write_bytes(before)
    metrics = Metrics(path)
    assert [row["step"] for row in metrics.rows()] == [1, 2, 3]
    metrics.truncate(2)
    assert path.read_bytes() == b"".join(ROWS[:2])
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == before
    assert "damaged lines" in caplog.text


def test_a_line_that_a_kill_tore_is_dropped_without_a_word(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(ROWS) + b'{"step": 4, "lo')
    Metrics(path).truncate(3)
    assert path.read_bytes() == b"".join(ROWS)
    assert not caplog.text
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_rows_stay_byte_for_byte(tmp_path):
    """Also those that this version would write in another way."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"loss": 1e-3,"step":1, "other": NaN}\n')
    Metrics(path).truncate(1)
    assert path.read_bytes() == b'{"loss": 1e-3,"step":1, "other": NaN}\n'
