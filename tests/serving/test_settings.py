import argparse

import pytest

from runtime.errors import InputError
from runtime.machine import processors
from runtime.serving.settings import BatchSettings, Limits, ServeSettings, add_arguments, settings_from


def test_a_command_line_without_options_gives_the_defaults():
    parser = argparse.ArgumentParser()
    add_arguments(parser, ServeSettings)
    values = vars(parser.parse_args(["--bundle", "b"]))
    assert settings_from(ServeSettings, values) == ServeSettings(bundle="b")


def test_required_options_are_asked_for(capsys):
    parser = argparse.ArgumentParser()
    add_arguments(parser, BatchSettings)
    with pytest.raises(SystemExit):
        parser.parse_args(["--bundle", "b", "--input", "i"])
    assert "--output" in capsys.readouterr().err


def test_unknown_and_missing_settings_of_a_file_are_named_together():
    with pytest.raises(InputError, match=r"missing \['bundle'\], unknown \['replica'\]"):
        settings_from(ServeSettings, {"replica": 2})


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"replicas": 0}, "replicas: expected an integer >= 1, got 0"),
        ({"batch_size": True}, "batch_size"),
        ({"threads": -1}, "threads"),
        ({"port": 65_536}, "port: expected 0..65535"),
        ({"batch_wait": 1.5}, "batch_wait"),
        ({"watch": 0.0}, "watch"),
        ({"name": "my model"}, "letters, digits"),
        ({"deadline": float("nan")}, "deadline"),
        ({"max_queued": 0}, "max_queued"),
        ({"max_body_mib": float("inf")}, "max_body_mib"),
        ({"autoscale": "3"}, "MIN:MAX"),
        ({"autoscale": "3:2"}, "1 <= MIN <= MAX"),
        ({"autoscale": "0:2"}, "1 <= MIN"),
        ({"autoscale": "a:b"}, "MIN:MAX"),
    ],
)
def test_a_setting_out_of_range_is_named_with_what_was_expected(values, told):
    with pytest.raises(InputError, match=told):
        ServeSettings(bundle="b", **values)


def test_replicas_share_the_processors_unless_threads_are_asked_for():
    assert ServeSettings(bundle="b").replica_threads() == processors()
    assert ServeSettings(bundle="b", replicas=processors()).replica_threads() == 1
    assert ServeSettings(bundle="b", autoscale=f"1:{2 * processors()}").replica_threads() == 1
    assert ServeSettings(bundle="b", replicas=64, threads=3).replica_threads() == 3


def test_autoscale_takes_the_place_of_replicas():
    assert ServeSettings(bundle="b", replicas=5, autoscale="2:8").replica_range == (2, 8)
    assert ServeSettings(bundle="b", replicas=5).replica_range == (5, 5)


def test_the_largest_body_is_told_in_bytes():
    assert Limits(max_body_mib=0.5).max_body_bytes == 524_288
