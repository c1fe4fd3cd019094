import pytest

from tf_lyapunov.planning.devices import DEVICES, Cluster, parse_devices


@pytest.mark.parametrize(
    ("text", "hosts", "per_host", "name"),
    [
        ("H100", 1, 1, "H100"),
        ("8xH100", 1, 8, "H100"),
        ("4x8xa100-80gb", 4, 8, "A100-80GB"),
        (" 2xTPUv5e ", 1, 2, "TPUv5e"),
        ("CPU", 1, 1, "cpu"),
    ],
)
def test_devices_are_read_with_hosts_and_counts(text, hosts, per_host, name):
    found = parse_devices(text)
    assert (found.hosts, found.per_host, found.device.name) == (hosts, per_host, name)
    assert found.replicas == hosts * per_host


@pytest.mark.parametrize("text", ["", "8", "x8", "0xH100", "-2xH100", "8xH1OO", "8 x H100", "8x"])
def test_what_is_no_device_is_refused(text):
    with pytest.raises(ValueError, match="Received"):
        parse_devices(text)


def test_a_near_miss_is_helped():
    with pytest.raises(ValueError, match="Did you mean H100"):
        parse_devices("8xH1000")


def test_one_device_communicates_nothing():
    assert parse_devices("H100").all_reduce_seconds(1e9) == 0.0


def test_an_all_reduce_moves_its_size_twice_less_one_share():
    device = DEVICES["H100"]
    seconds = Cluster(device, 8).all_reduce_seconds(1e9)
    assert seconds == pytest.approx(2 * 7 / 8 * 1e9 / device.link, rel=0.05)
    assert Cluster(device, 8, hosts=2).all_reduce_seconds(1e9) > seconds


def test_no_figure_passes_for_measured_that_is_not():
    for name, device in DEVICES.items():
        if name == "cpu":
            assert "measured" in device.source
        else:
            assert device.source == "data sheet"
            assert device.efficiency.source == "assumed, not measured"


def test_peaks_fall_back_to_float32():
    assert DEVICES["cpu"].peak("mixed_bfloat16") == DEVICES["cpu"].peak("float32")
    assert DEVICES["H100"].peak("mixed_bfloat16") > DEVICES["H100"].peak("float32")
