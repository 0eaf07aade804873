"""HPS, and the rules for pixels and tokens, against open_clip and torchvision (in a process of their own)."""

from __future__ import annotations

from pathlib import Path

from tests.parity.inside import needs_torchvision, run_with_torchvision


@needs_torchvision
def test_equals_open_clip_and_torchvision() -> None:
    folder = Path(__file__).parent / "with_torchvision"
    contract = Path(__file__).parents[1] / "contract/test_evaluator_contract.py"
    chosen = ("-k", "rules or hps.py or hps-v2")
    files = [str(folder / "rules.py"), str(folder / "hps.py"), str(contract), *chosen]
    shown = run_with_torchvision("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *files)
    assert " passed" in shown, shown
    assert "skipped" not in shown, shown
