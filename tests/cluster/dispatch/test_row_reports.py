"""What is reported of rows: those of now, or on a device that is busy those of before."""

from __future__ import annotations

import torch
from torch import Tensor

from divisi.cluster.dispatch.row_reports import RowReports

CPU = torch.device("cpu")


class Counted:
    """Two layers, three virtual shards."""

    num_leaves = 3

    def __init__(self) -> None:
        self.rows_LV = torch.zeros(2, 3, dtype=torch.int64)

    def leaf_rows(self) -> Tensor:
        return self.rows_LV


class Busy:
    """A device's event that comes when it is told to."""

    def __init__(self) -> None:
        self.has_come, self.recorded = True, 0

    def record(self) -> None:
        self.has_come, self.recorded = False, self.recorded + 1

    def query(self) -> bool:
        return self.has_come


def test_on_a_cpu_they_are_those_of_now() -> None:
    counted = Counted()
    reports = RowReports(counted, CPU)
    assert reports.rows() == {}
    counted.rows_LV[:, 1] += 4
    assert reports.rows() == {"1": 8.0}


def test_a_busy_device_is_not_waited_for() -> None:
    counted, event = Counted(), Busy()
    reports = RowReports(counted, CPU, lambda: event)
    counted.rows_LV[0, 2] = 5
    assert reports.rows() == {}, "they are being copied"
    counted.rows_LV[0, 2] = 6
    assert reports.rows() == {}
    assert event.recorded == 1, "no other copy begins"
    event.has_come = True
    assert reports.rows() == {"2": 5.0}
    event.has_come = True
    assert reports.rows() == {"2": 6.0}
