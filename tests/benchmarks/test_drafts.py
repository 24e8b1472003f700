"""What the tables of drafts say of numbers; what they measure is run by hand."""

from __future__ import annotations

from divisi.benchmarks.drafts.depths import DEPTHS, Wave, Waves, _table, _verdicts


def waves(rates: dict[str, list[float]], batch: int) -> Waves:
    return {
        (name, batch): [Wave({}, tokens=int(rate), steps=10, seconds=1.0) for rate in own]
        for name, own in rates.items()
    }


def test_the_adaptive_depth_is_held_against_none_and_the_best() -> None:
    rates = {
        "off": [100.0] * 3,
        "k = 1": [110.0] * 3,
        "k = 3": [130.0] * 3,
        "k = 5": [90.0] * 3,
        "adaptive": [122.0] * 3,
    }
    found = list(_verdicts(waves(rates, 4), [4]))
    assert found == [
        "batch 4: adaptive is 0.938 of k = 3, wanted 0.95: MISSED",
        "batch 4: adaptive is 1.220 of off, wanted 0.97: met",
    ]
    alone = list(_verdicts(waves(rates, 1), [1]))
    assert alone[1] == "batch 1: adaptive is 1.220 of off, wanted 1.5: MISSED"


def test_a_disturbed_round_disturbs_both() -> None:
    """Ratios are of the same round: a round in which the machine was half as fast changes none of them."""
    rates = {name: [100.0, 50.0, 100.0] for name in DEPTHS}
    found = list(_verdicts(waves(rates, 16), [16]))
    assert found == ["batch 16: adaptive is 1.000 of off, wanted 0.97: met"]


def test_every_depth_has_a_row() -> None:
    rows = list(_table(waves({name: [100.0, 200.0] for name in DEPTHS}, 1), [1]))
    assert len(rows) == 2 + len(DEPTHS)
    assert "| off | 150; 1.00x (1.00 to 1.00); 15.00 |" in rows
