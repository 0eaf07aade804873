from __future__ import annotations

import pytest

from diffpref.reporting.charts import Line, line_chart
from diffpref.reporting.formatting import change, change_interval, decimals_for, interval, number, p_value
from diffpref.reporting.scales import ticks


def test_numbers_are_written_for_people() -> None:
    assert number(0.5824, share=True) == "58.2 %"
    assert number(21.34567) == "21.35"
    assert interval([0.561, 0.602], share=True) == "56.1–60.2"
    assert change(0.0491, share=True) == "+4.9"
    assert change(-0.0491, share=True) == "−4.9"
    assert change(-0.0001, share=True) == "+0.0"
    assert change_interval([-0.5, 0.25]) == "−0.5 to +0.25"
    assert number(20.6, decimals=2) == "20.60"
    assert change(-1e-9, decimals=4) == "+0.0000"
    assert [decimals_for(ends) for ends in ([20.45, 20.76], [0.2621, 0.2659], [3.0, 3.0], [10, 90])] == [
        2, 4, None, 0
    ]  # fmt: skip
    assert p_value(0.0004) == "< 0.001"
    assert p_value(0.0321) == "0.032"


def test_charts_have_round_ticks_and_survive_flat_and_short_series() -> None:
    assert ticks(0, 1) == pytest.approx([0, 0.5, 1.0], abs=1e-12) or len(ticks(0, 1)) <= 6
    assert ticks(0.13, 0.87)[0] <= 0.13
    assert ticks(0.13, 0.87)[-1] >= 0.87
    for values in ([0.5], [0.5, 0.5, 0.5], [0.0, 0.0], [-1e-5, 2e-5]):
        svg = line_chart("Loss", [Line("loss", list(range(len(values))), values, "win")])
        assert "nan" not in svg
    long = line_chart("Loss", [Line("loss", list(range(5000)), [1.0] * 5000, "win")])
    assert len(long) < 20_000
