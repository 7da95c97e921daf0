import pytest

from lamina.platform.reporting import energy


@pytest.fixture
def powercap(tmp_path):
    def write(zone, name, microjoules, limit=1_000_000):
        folder = tmp_path / zone
        folder.mkdir(exist_ok=True)
        (folder / "name").write_text(name + "\n")
        (folder / "energy_uj").write_text(f"{microjoules}\n")
        (folder / "max_energy_range_uj").write_text(f"{limit}\n")

    write.root = tmp_path
    (tmp_path / "intel-rapl").mkdir()
    write("intel-rapl:0", "package-0", 400_000)
    write("intel-rapl:1", "package-1", 900_000)
    write("intel-rapl:0:0", "core", 100_000)
    write("intel-rapl:2", "psys", 5)
    write("intel-rapl-mmio:0", "package-0", 7)
    return write


def test_only_processor_packages_are_read_so_that_nothing_counts_twice(powercap):
    assert set(energy.read(powercap.root)) == {"intel-rapl:0", "intel-rapl:1"}


def test_joules_add_up_over_packages_and_a_wrapped_counter(powercap):
    before = energy.read(powercap.root)
    powercap("intel-rapl:0", "package-0", 650_000)
    powercap("intel-rapl:1", "package-1", 100_000)  # wrapped: 100_000 to the top, 100_000 more
    assert energy.joules(before, energy.read(powercap.root)) == pytest.approx(0.25 + 0.2)


def test_a_meter_follows_several_wraps_and_goes_on_from_a_saved_total(powercap):
    meter = energy.Meter(saved=10.0, root=powercap.root)
    for value in (600_000, 200_000, 800_000, 100_000):  # +0.2, +0.6, +0.6, +0.3
        powercap("intel-rapl:0", "package-0", value)
        total = meter.update()
    assert total == pytest.approx(11.7)


@pytest.mark.parametrize("content", ["", "secret"])
def test_a_machine_that_does_not_tell_gives_none(tmp_path, content):
    assert energy.read(tmp_path / "absent") is None
    zone = tmp_path / "intel-rapl:0"
    zone.mkdir()
    (zone / "name").write_text("package-0")
    (zone / "energy_uj").write_text(content)
    assert energy.read(tmp_path) is None
    assert energy.joules(None, {}) is None
    assert energy.Meter(root=tmp_path).update() is None
