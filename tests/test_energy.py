"""Energy read from counters that the test writes itself, and estimated by hand."""

import pytest

from course_utils import energy, models
from course_utils.cost import LayerCost, cost

COSTS = [LayerCost("a", macs=1_000_000, weights=1000, inputs=300, outputs=200)]


class Sysfs:
    """A folder of RAPL counters as Linux shows them."""

    def __init__(self, root):
        self.root = root

    def counter(self, folder, name, microjoules=0, wrap=1_000_000_000):
        path = self.root / folder
        path.mkdir(parents=True)
        (path / "name").write_text(f"{name}\n")
        (path / "energy_uj").write_text(f"{microjoules}\n")
        (path / "max_energy_range_uj").write_text(f"{wrap}\n")

    def add(self, folder, microjoules):
        path = self.root / folder / "energy_uj"
        wrap = int((self.root / folder / "max_energy_range_uj").read_text())
        path.write_text(f"{(int(path.read_text()) + microjoules) % (wrap + 1)}\n")


@pytest.fixture
def sysfs(tmp_path, monkeypatch):
    """A machine with one package, the parts and doubles of it that must not be counted, and 2 W at rest."""
    found = Sysfs(tmp_path)
    found.counter("intel-rapl:0", "package-0", microjoules=999_000_000)
    found.counter("intel-rapl:0:0", "core")
    found.counter("intel-rapl:0:1", "dram")
    found.counter("intel-rapl:1", "psys")
    found.counter("intel-rapl-mmio:0", "package-0")
    clock = {"now": 0.0}

    def sleep(seconds):
        clock["now"] += seconds
        found.add("intel-rapl:0", int(2e6 * seconds))

    monkeypatch.setattr(energy.time, "perf_counter", lambda: clock["now"])
    monkeypatch.setattr(energy.time, "sleep", sleep)
    found.sleep = sleep
    return found


def test_package_and_dram_are_counted_once_and_idle_power_apart(sysfs):
    def call():  # half a second: 2 W at rest, 3 J more in the package, 1 J in its memory
        sysfs.sleep(0.5)
        sysfs.add("intel-rapl:0", 3_000_000)
        sysfs.add("intel-rapl:0:1", 1_000_000)
        for other in ("intel-rapl:0:0", "intel-rapl:1", "intel-rapl-mmio:0"):
            sysfs.add(other, 50_000_000)

    found = energy.energy(call, seconds=2, idle=2, root=sysfs.root)
    assert (found.kind, found.calls, found.source) == ("measured", 4, "RAPL: package-0, dram")
    assert found.idle_watts == pytest.approx(2)
    assert found.joules == pytest.approx(5) and found.above_idle == pytest.approx(4)
    assert "5e+03 mJ measured" in str(found) and "above 2 W at idle" in str(found)


def test_a_counter_that_starts_again_is_read_on(sysfs):
    # 999 J of 1,000 are on the counter: it starts again during the call.
    found = energy.energy(lambda: sysfs.add("intel-rapl:0", 7_000_000), seconds=0, idle=0.1, root=sysfs.root)
    assert int((sysfs.root / "intel-rapl:0" / "energy_uj").read_text()) < 999_000_000
    assert found.joules == pytest.approx(7) and found.calls == 1


def test_several_packages_are_added(sysfs):
    sysfs.counter("intel-rapl:2", "package-1")

    def call():
        sysfs.add("intel-rapl:0", 1_000_000)
        sysfs.add("intel-rapl:2", 2_000_000)

    assert energy.energy(call, seconds=0, root=sysfs.root).joules == pytest.approx(3)


def test_without_counters_the_estimate_says_so_or_there_is_an_error(tmp_path):
    estimated = energy.estimate(COSTS)
    found = energy.energy(lambda: 1 / 0, estimate=estimated, root=tmp_path)
    assert (found.kind, found.joules) == ("estimated", estimated.joules) and "no RAPL counter" in found.why
    assert "estimated" in str(found) and "not measured: the system shows no RAPL counter" in str(found)
    with pytest.raises(RuntimeError, match="no RAPL counter"):
        energy.energy(print, root=tmp_path)


def test_closed_counters_are_named_with_a_way_to_open_them(sysfs, monkeypatch):
    original = energy.Path.read_text

    def closed(path, *args, **options):
        if path.name == "energy_uj":
            raise PermissionError(path)
        return original(path, *args, **options)

    monkeypatch.setattr(energy.Path, "read_text", closed)
    with pytest.raises(
        RuntimeError, match=r"only root may read the counters of intel-rapl:0, intel-rapl:0:1 .*chmod a\+r"
    ):
        energy.energy(print, root=sysfs.root)


@pytest.mark.parametrize("damage", ["unlink", "words"])
def test_a_counter_whose_range_is_unknown_is_not_used(sysfs, damage):
    path = sysfs.root / "intel-rapl:0:1" / "max_energy_range_uj"
    path.unlink() if damage == "unlink" else path.write_text("unknown")
    assert energy.energy(lambda: None, seconds=0, root=sysfs.root).source == "RAPL: package-0"


def test_the_estimate_is_operations_and_bytes_by_the_table():
    found = energy.estimate(COSTS)
    assert found.arithmetic == pytest.approx(1e6 * 4.6e-12)
    assert found.low == pytest.approx(found.arithmetic + 4 * 1000 * 1300e-12 / 8)
    assert found.high == pytest.approx(found.arithmetic + 4 * 1500 * 2600e-12 / 8)
    assert found.joules == pytest.approx((found.low + found.high) / 2)
    assert energy.EstimatedEnergy(1, 2, 4, "a table").joules == 3
    int8 = energy.estimate(COSTS, arithmetic="int8")
    assert found.arithmetic / int8.arithmetic == pytest.approx(46 / 3)
    narrow = energy.estimate(COSTS, weight_bits=4)
    assert narrow.arithmetic == found.arithmetic
    assert narrow.high == pytest.approx(found.arithmetic + (500 + 4 * 500) * 2600e-12 / 8)
    with pytest.raises(ValueError, match="'fp8'.*choose one of fp32, fp16, int8"):
        energy.estimate(COSTS, arithmetic="fp8")


def test_resnet18_costs_what_the_literature_computes():
    costs = cost(models.build("resnet18", num_classes=1000), (3, 224, 224))
    fp32, int8 = energy.estimate(costs), energy.estimate(costs, arithmetic="int8")
    assert 1000 * fp32.arithmetic == pytest.approx(8.34, abs=0.01)
    assert 1000 * int8.arithmetic == pytest.approx(0.544, abs=0.001)
    assert 1000 * (fp32.low - fp32.arithmetic) == pytest.approx(7.6, abs=0.05)  # 46.7 MB of weights from DRAM


def test_measured_and_estimated_are_neither_compared_nor_put_into_one_column():
    measured = energy.MeasuredEnergy(0.5, 0.4, idle_watts=2, calls=4, source="RAPL: package-0")
    estimated = energy.estimate(COSTS)
    assert measured.times(measured) == 1
    with pytest.raises(ValueError, match="two of one kind"):
        measured.times(estimated)
    table = energy.table({"FP32": measured, "INT8": estimated})
    assert table.rows[0] == ["FP32", "500", "400", "–"]
    assert table.rows[1][:3] == ["INT8", "–", "–"] and table.rows[1][3] != "–"
    assert energy.table({"INT4": energy.EstimatedEnergy(1, 2, 4, "a table")}).rows == [
        ["INT4", "–", "–", "2e+03 – 4e+03"]
    ]
